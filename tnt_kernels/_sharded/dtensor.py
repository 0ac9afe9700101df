"""Logits that are DTensors: sharded over the vocabulary, as tensor-parallel models leave them, and maybe over rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


def is_dtensor(x: Any) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "placements") and hasattr(x, "device_mesh")


class Local(NamedTuple):
    """This rank's part of a call."""

    logits: Tensor
    ref_logits: Any
    rows: tuple[Any, ...]  # labels, weights, alpha, negative_ids, normalizer
    group: Any  # None where no dimension of the mesh shards the vocabulary
    shard_sizes: list[int] | None


def local(logits: Any, ref_logits: Any, rows: dict[str, Any]) -> Local:
    """What ``tnt_loss`` computes here; the gradient comes back as a DTensor with the placements of the logits.

    Raises:
        TypeError: a reference that is no DTensor.
        ValueError: logits that are not sharded on the last dimension or on rows alone, or over the vocabulary more than
            once; another tensor that is placed otherwise.
    """
    from torch.distributed.tensor import Replicate, Shard

    last = logits.dim() - 1
    over_vocab = []
    for i, placement in enumerate(logits.placements):
        if type(placement) is Shard and placement.dim == last:
            over_vocab.append(i)
        elif type(placement) is not Shard:
            raise _placed("logits", logits, "Shard of the last dimension or of a row dimension")
    if len(over_vocab) > 1:
        raise _placed("logits", logits, "the last dimension to be sharded over one mesh dimension")
    if ref_logits is not None:
        if not is_dtensor(ref_logits):
            raise TypeError(
                f"ref_logits: {type(ref_logits).__name__}, expected a DTensor, as logits are one"
            )
        _like("ref_logits", ref_logits, logits, logits.placements)
        if ref_logits.shape != logits.shape:
            raise ValueError(
                f"ref_logits: shape {tuple(ref_logits.shape)}, expected {tuple(logits.shape)}, that of logits"
            )
        ref_logits = ref_logits.to_local()
    of_rows = [Replicate() if i in over_vocab else p for i, p in enumerate(logits.placements)]
    parts = []
    for name, x in rows.items():
        if is_dtensor(x):
            expected = of_rows if x.dim() >= last else [Replicate()] * len(of_rows)
            _like(name, x, logits, expected)
            x = x.to_local()
        parts.append(x)
    here = logits.to_local(grad_placements=logits.placements)
    if not over_vocab:
        return Local(here, ref_logits, tuple(parts), None, None)
    (dimension,) = over_vocab
    mesh, vocab = logits.device_mesh, logits.size(-1)
    count = mesh.size(dimension)
    chunk = -(-vocab // count)  # as torch.chunk cuts
    sizes = [max(0, min(chunk, vocab - i * chunk)) for i in range(count)]
    return Local(here, ref_logits, tuple(parts), mesh.get_group(dimension), sizes)


def _like(name: str, x: Any, logits: Any, placements: Any) -> None:
    if x.device_mesh != logits.device_mesh:
        raise ValueError(
            f"{name}: on {x.device_mesh}, expected {logits.device_mesh}, that of logits"
        )
    if tuple(x.placements) != tuple(placements):
        raise _placed(name, x, str(tuple(placements)))


def _placed(name: str, x: Any, expected: str) -> ValueError:
    return ValueError(f"{name}: DTensor with placements {tuple(x.placements)}, expected {expected}")
