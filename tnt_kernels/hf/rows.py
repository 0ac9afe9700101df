"""The rows of a batch: labels, weights and negative ids in line with the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels._call import active_rows, negative_rows

IGNORED = -100
#: The columns that ``CountedRows`` adds.
ACTIVE_ROWS = "active_rows"
SEVERAL_TEXTS = "several_texts"


class Rows(NamedTuple):
    labels: Tensor  # (B, T) int64
    weights: Tensor | None  # (B, T) real
    negative_ids: Tensor | None  # (B, T, K) or (K,) int64

    def active(self) -> Tensor:
        """(B, T) bool: the rows that count."""
        return active_rows(self.labels, self.weights, IGNORED)

    def negative(self) -> Tensor:
        """(B, T) bool: the active rows with something to remove."""
        return negative_rows(self.labels, self.weights, self.negative_ids) & self.active()


def first_tokens(batch: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """(B, T) bool: where texts begin, if positions or lengths of texts packed into a row say so.

    No text's end predicts the beginning of the next one.
    """
    positions, ends = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    starts = None
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.size(1) == shape[1]:
        starts = (positions == 0).expand(shape)
    if isinstance(ends, Tensor) and shape[0] == 1:
        begins = torch.zeros(shape, dtype=torch.bool, device=ends.device)
        begins[0, ends[:-1].long()] = True
        starts = begins if starts is None else starts | begins
    return starts


def later_texts(batch: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """(B, T - 1) bool: where a text begins behind another one in its row; element t speaks of token t + 1."""
    starts = first_tokens(batch, shape)
    if starts is None:
        return None
    starts = starts[:, 1:]
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == shape:  # positions of padding say nothing
        starts = starts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return starts


def take_rows(batch: MutableMapping[str, Any], causal: bool) -> Rows:
    """Removes labels, weights and negative ids from ``batch``; for a causal model, shifts them by one position.

    Row t of a causal model's logits predicts token t + 1, and nothing follows the last position. The decoder of an
    encoder-decoder model reads inputs that are shifted already.
    """
    if batch.get("labels") is None:
        raise ValueError(
            f"batch: no labels among its columns ({', '.join(batch)}), expected labels and weights or negative_ids"
        )
    labels, weights, negative_ids = (
        batch.pop(name, None) for name in ("labels", "weights", "negative_ids")
    )
    if weights is None and negative_ids is None:
        raise ValueError(
            f"batch: neither weights nor negative_ids among its columns ({', '.join(('labels', *batch))}): nothing "
            "says what is unwanted"
        )
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(
            f"weights: shape {tuple(weights.shape)}, expected {tuple(labels.shape)}, that of labels"
        )
    if causal:
        starts = first_tokens(batch, labels.shape)
        if starts is not None:
            labels = labels.masked_fill(starts, IGNORED)
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        weights = None if weights is None else F.pad(weights[:, 1:], (0, 1))
        if negative_ids is not None and negative_ids.dim() > 1:
            negative_ids = F.pad(negative_ids[:, 1:], (0, 0, 0, 1), value=-1)
    return Rows(labels, weights, negative_ids)


@dataclass
class CountedRows:
    """A collator, and in its batches how many rows count, and whether a row holds several texts.

    They are an int and a bool, as to ask a device for them would be to wait for it.
    """

    collator: Callable[[list[Any]], Any]
    causal: bool

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = dict(self.collator(examples))
        if "labels" in batch and {"weights", "negative_ids"} & {*batch}:
            batch[ACTIVE_ROWS] = int(take_rows(dict(batch), self.causal).active().sum())
            if self.causal:
                later = later_texts(batch, batch["labels"].shape)
                batch[SEVERAL_TEXTS] = later is not None and bool(later.any())
        return batch
