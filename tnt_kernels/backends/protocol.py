"""What a backend is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tnt_kernels._call import RowCall, active_rows


class Backend(Protocol):
    """What computes rows: a module with these functions, in one file, and with one entry in ``backends.BACKENDS``.

    Importing it queries no device and loads no compiler. Backends know nothing of autograd, and nothing of each other.
    """

    def why_not(self, logits: Tensor | None) -> str:
        """Why this backend cannot serve these logits, or (None) any on this machine; empty where it can."""

    def launch(self, call: RowCall) -> None:
        """Writes the outputs of a call, on the device and the current stream of its logits, and waits for neither.

        ``RowCall`` has the shapes. Rows are dense at any distance (``stride(0)``, in 64 bits), and no input is written
        to. ``gradient`` may be the logits; otherwise no two tensors share memory. Rows of weight 0 are not read, and
        their gradient is 0. N may be 0, and V where the vocabulary is sharded.

        Raises:
            ValueError: a label or an id outside the vocabulary, on a CPU, in the first launch of its rows and before
                anything is written. Elsewhere it makes its row's loss NaN.
        """

    def scale_(self, gradient: Tensor, scale: Tensor) -> None:
        """Multiplies a dense gradient in place by a 0-dim real on its device: for free where that is 1.

        Nobody waits for the device to learn whether it is.
        """


def describe(logits: Tensor) -> str:
    return f"{str(logits.dtype).removeprefix('torch.')} on {logits.device}"


def check_indices(
    labels: Tensor,
    weights: Tensor | None,
    negative_ids: Tensor | None,
    vocab: int,
    ignore_index: int,
) -> None:
    """On the CPU, labels and ids outside the vocabulary are an error; elsewhere asking would wait for the device.

    Rows are (N,).
    """
    if labels.device.type != "cpu":
        return
    active = active_rows(labels, weights, ignore_index)
    outside = active & ((labels < 0) | (labels >= vocab))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"labels: row {row} has label {int(labels[row])}, expected 0 <= label < V "
            f"(vocabulary size {vocab}) or ignore_index ({ignore_index})"
        )
    if negative_ids is not None:
        outside = (negative_ids < -1) | (negative_ids >= vocab)
        per_row = negative_ids.dim() == 2
        if per_row:
            outside &= active[:, None]
        if outside.any() and len(active):
            index = outside.nonzero()[0].tolist()
            raise ValueError(
                f"negative_ids: row {index[0] if per_row else 0} has id {int(negative_ids[tuple(index)])}, "
                f"expected 0 <= id < V (vocabulary size {vocab}), or -1 as padding"
            )


def scale_by_item(gradient: Tensor, scale: Tensor) -> None:
    """Multiplies in place by a number on the CPU, where it costs nothing to see that it is 1."""
    if scale.item() != 1:
        with torch.no_grad():
            gradient.mul_(scale)
