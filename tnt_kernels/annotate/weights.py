"""Weights of the tokens of annotated texts: from spans, blocklists and corrections.

1 keeps a token, -1 removes it, 0 leaves its row out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


def weights_from_spans(
    offset_mapping: Tensor | Sequence[Any],
    spans: Sequence[Any],
    mode: str = "all",
    *,
    mask: Tensor | Sequence[Any] | None = None,
) -> Tensor:
    """-1 for tokens that overlap an unwanted span of characters, 1 for the others.

    Args:
        offset_mapping: (B, T, 2) or (T, 2) integer: where each token begins and ends in the text, as fast tokenizers
            give it. Equal numbers: a token without text (padding, BOS, EOS).
        spans: for each of the B texts (for (T, 2): for the text) its pairs ``(begin, end)`` of characters.
        mode: "all" marks every token that overlaps a span, "first" only the first one of each span.
        mask: (B, T) or (T,): 0 where the weight is to be 0, as an attention mask. None: where a token has no text.

    Returns:
        (B, T) or (T,) float32.

    Raises:
        ValueError: an unknown mode; shapes that do not fit; a span that is empty or inside no token.
    """
    _check_mode(mode, ("all", "first"))
    offsets = torch.as_tensor(offset_mapping)
    if offsets.dim() not in (2, 3) or offsets.size(-1) != 2:
        raise ValueError(
            f"offset_mapping: shape {tuple(offsets.shape)}, expected (T, 2) or (B, T, 2)"
        )
    single = offsets.dim() == 2
    texts = [spans] if single else spans
    offsets = offsets[None] if single else offsets
    if len(texts) != len(offsets):
        raise ValueError(
            f"spans: {len(texts)} lists, expected {len(offsets)}, one for each text of offset_mapping"
        )
    most = max((len(text) for text in texts), default=0)
    padded = torch.zeros(len(texts), most, 2, dtype=torch.int64)  # (0, 0) overlaps nothing
    for row, text in enumerate(texts):
        for i, span in enumerate(text):
            begin, end = (int(x) for x in span)
            if not 0 <= begin < end:
                raise ValueError(
                    f"spans: ({begin}, {end}) of text {row}, expected (begin, end) with 0 <= begin < end"
                )
            padded[row, i] = torch.tensor((begin, end))
    padded = padded.to(offsets.device)
    begins, ends = offsets[:, :, None, 0], offsets[:, :, None, 1]  # (B, T, 1) against (B, 1, S)
    overlaps = (begins < padded[:, None, :, 1]) & (ends > padded[:, None, :, 0]) & (begins < ends)
    missed = ~overlaps.any(dim=1) & (padded[..., 1] > 0)
    if bool(missed.any()):
        row, i = missed.nonzero()[0].tolist()
        begin, end = padded[row, i].tolist()
        raise ValueError(
            f"spans: ({begin}, {end}) of text {row} is inside no token; its tokens have text up to character "
            f"{int(ends[row].max())}"
        )
    if mode == "first":
        overlaps &= overlaps.cumsum(dim=1) == 1
    keep = _as_mask(mask, offsets.shape[:2], single, offsets.device)
    if keep is None:
        keep = offsets[..., 0] < offsets[..., 1]
    weights = _weights(overlaps.any(dim=2), keep)
    return weights[0] if single else weights


def weights_from_blocklist(
    ids: Ids,
    sequences: Iterable[Sequence[int]],
    mode: str = "all",
    *,
    mask: Tensor | Sequence[Any] | None = None,
) -> Tensor:
    """-1 for tokens of unwanted sequences of ids, 1 for the others.

    It knows a phrase by its ids alone: give every tokenisation that counts (with and without the space before it), or
    use :func:`negative_ids_from_phrases`, which goes by the text.

    Args:
        ids: (B, T) or (T,) token ids; negative ones are padding.
        sequences: the unwanted sequences of ids.
        mode: what is marked of each occurrence: "all" its tokens, the "first", or the "last" (with which it is
            complete).
        mask: (B, T) or (T,): 0 where the weight is to be 0 and no sequence is looked for. None: padding.

    Returns:
        (B, T) or (T,) float32.

    Raises:
        ValueError: an unknown mode, an empty sequence, shapes that do not fit.
    """
    _check_mode(mode, ("all", "first", "last"))
    batch, single = _as_batch("ids", ids)
    keep = _as_mask(mask, batch.shape, single, batch.device)
    keep = batch >= 0 if keep is None else keep & (batch >= 0)
    length = batch.size(1)
    marked = torch.zeros_like(keep)
    for sequence in {tuple(int(i) for i in sequence) for sequence in sequences}:
        n = len(sequence)
        if n == 0:
            raise ValueError("sequences: an empty one, expected at least one id in each")
        if n > length:
            continue
        found = torch.ones_like(keep[:, : length - n + 1])  # by where the occurrence begins
        for j, token in enumerate(sequence):
            place = slice(j, length - n + 1 + j)
            found &= (batch[:, place] == token) & keep[:, place]
        for j in {"all": range(n), "first": (0,), "last": (n - 1,)}[mode]:
            marked[:, j : length - n + 1 + j] |= found
    weights = _weights(marked, keep)
    return weights[0] if single else weights


def weights_from_correction(
    negative: Ids, corrected: Ids, mode: str = "first", *, pad_id: int = 0
) -> Tensor:
    """Weights of unwanted texts, from the texts they should have been.

    Compared position by position, as the feature converters of the authors' code do
    (https://github.com/google/t5patches); where the two end at different lengths, the rest differs. Where nothing
    differs, "first" and "diff" mark nothing: the text is right, and all of it is kept. In this "first" departs from the
    authors' code, which finds its token by an argmax over the differences, and so marks the first token of a text
    without any; to train on the same tokens as that code does, set that weight to -1.

    Args:
        negative: (B, T) or (T,) ids of what the model said.
        corrected: (B, T') or (T',) ids of what it should have said.
        mode: "first" marks the first token that differs, "diff" all that differ, "full" every token.
        pad_id: the id of padding, in both. Negative ids are padding too.

    Returns:
        float32, the shape of ``negative``: -1 where marked, 0 on padding, 1 elsewhere.

    Raises:
        ValueError: an unknown mode, shapes that do not fit.
    """
    _check_mode(mode, ("first", "diff", "full"))
    said, single = _as_batch("negative", negative)
    better, also_single = _as_batch("corrected", corrected)
    if single != also_single or len(said) != len(better):
        raise ValueError(
            f"corrected: shape {tuple(better.shape[also_single:])}, expected as many texts as negative has, "
            f"which is {tuple(said.shape[single:])}"
        )
    better = better.to(said.device)[:, : said.size(1)]
    missing = said.size(1) - better.size(1)
    better = torch.nn.functional.pad(better, (0, missing), value=pad_id)
    keep = (said != pad_id) & (said >= 0)
    marked = torch.ones_like(keep) if mode == "full" else said != better
    marked &= keep
    if mode == "first":
        marked &= marked.cumsum(dim=1) == 1
    weights = _weights(marked, keep)
    return weights[0] if single else weights


def _weights(marked: Tensor, keep: Tensor) -> Tensor:
    return torch.where(marked, -1.0, 1.0) * keep


def _check_mode(mode: str, known: tuple[str, ...]) -> None:
    if mode not in known:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(map(repr, known))}")


def _as_batch(name: str, ids: Ids) -> tuple[Tensor, bool]:
    batch = torch.as_tensor(ids)
    if batch.numel() == 0:
        batch = batch.long()
    if batch.dim() not in (1, 2) or batch.dtype.is_floating_point:
        raise ValueError(
            f"{name}: shape {tuple(batch.shape)}, {batch.dtype}, expected integers of shape (T,) or (B, T)"
        )
    return (batch[None], True) if batch.dim() == 1 else (batch, False)


def _as_mask(
    mask: Tensor | Sequence[Any] | None, shape: torch.Size, single: bool, device: torch.device
) -> Tensor | None:
    if mask is None:
        return None
    keep = torch.as_tensor(mask, device=device) != 0
    keep = keep[None] if single else keep
    if keep.shape != shape:
        raise ValueError(
            f"mask: shape {tuple(keep.shape[single:])}, expected {tuple(shape[single:])}"
        )
    return keep
