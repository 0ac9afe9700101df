"""From annotations to the ``weights`` and ``negative_ids`` of the losses: spans, blocklists, corrections, phrases.

Works on padded batches of token ids; needs no tokenizer library. What is returned is aligned with the ids: position t
speaks of token t. For a causal model, whose row t of logits predicts token t + 1, shift it like the labels.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


# --- Weights: 1 keeps a token, -1 removes it, 0 leaves its row out ---------------------------------


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


# --- Negative ids: all the tokens that would complete an unwanted phrase ---------------------------


class NegativePhrases:
    """Which tokens would complete an unwanted phrase, at every prefix, however the phrase is split into tokens.

    Works on the bytes of the text. Which tokens are unwanted next depends on the text so far through one number, its
    state: the longest end of it with which a phrase begins (the automaton of Aho and Corasick, CACM 18(6), 1975). A
    token completes a phrase if it contains one, or if it begins with what a phrase still lacks in that state. So
    phrases that overlap, contain each other or span many tokens are all caught.

    Args:
        phrases: the unwanted texts.
        tokens: the bytes of each token of the vocabulary; ``token_bytes`` reads them off a tokenizer.
        ignore_case: ASCII letters count as their lower case.
        word_start: only where a word begins: after a byte that is no ASCII letter, digit or "_", and at the beginning
            of a text. Such bytes then all count as the same, in phrases too.

    Attributes:
        start: the state before the first token.
        negative_ids: (number of states, K) int64, padded with -1: the tokens that complete a phrase in each state.

    Raises:
        ValueError: no phrases, or an empty one.
    """

    def __init__(
        self,
        phrases: Iterable[str],
        tokens: Sequence[bytes],
        *,
        ignore_case: bool = False,
        word_start: bool = False,
    ) -> None:
        classes = _byte_classes(ignore_case, word_start)
        boundary = b" " if word_start else b""
        patterns = sorted(
            {(boundary + phrase.encode()).translate(classes) for phrase in _texts(phrases)}
        )
        self._tokens = [bytes(token).translate(classes) for token in tokens]
        self._outside = _BOUNDARY.translate(classes)
        # Prefixes of patterns are the states; ``endings`` holds each one's ends that are states, the longest first.
        prefixes = sorted({pattern[:n] for pattern in patterns for n in range(len(pattern) + 1)})
        index = {prefix: state for state, prefix in enumerate(prefixes)}
        endings = [
            [index[prefix[n:]] for n in range(len(prefix) + 1) if prefix[n:] in index]
            for prefix in prefixes
        ]
        self.start = index[boundary]
        self._next = _transitions(prefixes, index, endings)
        accepts = {index[pattern] for pattern in patterns}
        self._accepts = torch.tensor([not accepts.isdisjoint(chain) for chain in endings])
        self.negative_ids = self._completions(patterns, prefixes, endings)
        self._widths = (self.negative_ids >= 0).sum(dim=1)

    def _completions(
        self, patterns: list[bytes], prefixes: list[bytes], endings: list[list[int]]
    ) -> Tensor:
        anywhere = re.compile(b"|".join(map(re.escape, patterns)))
        always = {i for i, token in enumerate(self._tokens) if anywhere.search(token)}
        order = sorted(range(len(self._tokens)), key=self._tokens.__getitem__)
        texts = [self._tokens[i] for i in order]
        completing: list[set[int]] = []  # for each prefix, the tokens that begin with its remainder
        for prefix in prefixes:
            found: set[int] = set()
            for pattern in patterns[bisect_left(patterns, prefix) :]:
                if not pattern.startswith(prefix):
                    break
                rest = pattern[len(prefix) :]
                for place in range(
                    bisect_left(texts, rest) if rest and prefix else len(texts), len(texts)
                ):
                    if not texts[place].startswith(rest):
                        break
                    found.add(order[place])
            completing.append(found)
        rows = [sorted(always.union(*(completing[end] for end in chain))) for chain in endings]
        table = torch.full((len(rows), max(map(len, rows))), -1)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return table

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For token ids (B, T): the state after each token, and which tokens complete a phrase.

        Ids outside the vocabulary (padding) count as a text boundary.
        """
        if ids.dim() != 2 or ids.dtype.is_floating_point:
            raise ValueError(
                f"ids: shape {tuple(ids.shape)}, {ids.dtype}, expected integers (B, T)"
            )
        texts = [
            [self._tokens[i] if 0 <= i < len(self._tokens) else self._outside for i in row]
            for row in ids.tolist()
        ]
        lengths = torch.tensor([[len(token) for token in row] for row in texts], dtype=torch.int64)
        ends = lengths.view(ids.shape).cumsum(dim=1)
        longest = int(ends.max()) if ends.numel() else 0
        # Column n of ``states``: after n bytes. Shorter texts go on with zeros, which no one looks at.
        text = b"".join(b"".join(row).ljust(longest, b"\0") for row in texts)
        stream = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0)
        stream = stream.view(len(texts), longest).long().t().contiguous()
        states = torch.full((longest + 1, len(texts)), self.start)
        for n, column in enumerate(stream):
            torch.take(self._next, states[n] * 256 + column, out=states[n + 1])
        accepted = self._accepts[states]
        accepted[0] = False
        count = accepted.cumsum(dim=0).t()  # (B, bytes + 1): phrases completed by then
        before = torch.nn.functional.pad(ends, (1, 0))[:, :-1]
        completed = count.gather(1, ends) > count.gather(1, before)
        return states.t().gather(1, ends).to(ids.device), completed.to(ids.device)

    def after(self, ids: Tensor) -> Tensor:
        """(B, T, K): the tokens that would complete a phrase right after each prefix ``ids[:, : t + 1]``.

        In line with the logits of a causal model that read ``ids`` (B, T). Padded with -1.
        """
        return self._of(self.read(ids)[0])

    def at(self, ids: Tensor) -> Tensor:
        """(B, T, K): the tokens that would complete a phrase in place of token t, after ``ids[:, :t]``.

        In line with the labels. Padded with -1.
        """
        states = self.read(ids)[0]
        return self._of(torch.nn.functional.pad(states, (1, 0), value=self.start)[:, :-1])

    def completed(self, ids: Tensor, start: int = 0) -> Tensor:
        """(B,) bool: which of the texts (B, T) complete a phrase at position ``start`` or later."""
        return self.read(ids)[1][:, start:].any(dim=1)

    def _of(self, states: Tensor) -> Tensor:
        widest = int(self._widths[states.cpu()].max()) if states.numel() else 0
        return self.negative_ids.to(states.device)[:, :widest][states]


def negative_ids_from_phrases(
    tokenizer: Any, phrases: Iterable[str], *, ignore_case: bool = False, word_start: bool = False
) -> NegativePhrases:
    """:class:`NegativePhrases` of a tokenizer's vocabulary; its arguments are explained there.

    Args:
        tokenizer: a Hugging Face tokenizer, or one of the ``tokenizers`` package.
        phrases: the unwanted texts.
    """
    tokens = token_bytes(tokenizer)
    return NegativePhrases(phrases, tokens, ignore_case=ignore_case, word_start=word_start)


_BOUNDARY = b"\0"  # in no phrase


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token of a tokenizer's vocabulary adds to the text, as bytes.

    Special tokens, which are not text, are ``b"\\0"``: no phrase reaches across them.

    Args:
        tokenizer: a Hugging Face tokenizer, or one of the ``tokenizers`` package.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend = getattr(backend, "_tokenizer", backend)  # of ByteLevelBPETokenizer and its like
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        special = set(tokenizer.all_special_ids)
    else:
        names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        special = set()
    added: dict[int, str] = {}  # these stand in the text as they are
    if hasattr(backend, "get_added_tokens_decoder"):
        for i, token in backend.get_added_tokens_decoder().items():
            added[i] = token.content
            if token.special:
                special.add(i)
    decoders = _decoders(backend)
    if not decoders:
        return _by_decoding(tokenizer, len(names), special)
    characters = {character: bytes([byte]) for byte, character in _byte_characters().items()}

    def read(i: int, name: str | None) -> bytes:
        if name is None or i in special:
            return _BOUNDARY
        if i in added and "WordPiece" not in decoders:
            return added[i].encode()
        if "ByteLevel" in decoders:
            return b"".join(characters.get(c) or c.encode() for c in name)
        if "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if "WordPiece" in decoders:
            return (name[2:] if name.startswith("##") else f" {name}").encode()
        return name.replace("▁", " ").encode()

    return [read(i, name) for i, name in enumerate(names)]


def token_offsets(tokens: Sequence[bytes]) -> Tensor:
    """(T, 2) int64: where each token begins and ends in the text, counted in characters.

    Args:
        tokens: the bytes of each token of a text, UTF-8 in total. One that holds a part of a character's bytes covers
            that character; one without bytes covers nothing.
    """
    data = torch.frombuffer(bytearray(b"".join(tokens) + b" "), dtype=torch.uint8)
    characters = ((data & 0xC0) != 0x80).long().cumsum(dim=0)  # begun up to and with each byte
    ends = torch.tensor([len(token) for token in tokens], dtype=torch.int64).cumsum(dim=0)
    begins = torch.nn.functional.pad(ends, (1, 0))[:-1]
    first, beyond = characters[begins] - 1, characters[(ends - 1).clamp(min=0)]
    return torch.stack((first, torch.where(ends > begins, beyond, first)), dim=1)


def _decoders(backend: Any) -> set[str]:
    """The kinds of decoder of a ``tokenizers.Tokenizer``; empty if it has none."""
    decoder = getattr(backend, "decoder", None)
    if decoder is None or not hasattr(decoder, "__getstate__"):
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def _by_decoding(tokenizer: Any, count: int, special: set[int]) -> list[bytes]:
    """Of a tokenizer that says nothing of itself: what a token adds behind another one."""
    anchor = next(i for i in range(count) if i not in special)
    base = tokenizer.decode([anchor], clean_up_tokenization_spaces=False)

    def read(i: int) -> bytes:
        if i in special:
            return _BOUNDARY
        text: str = tokenizer.decode([anchor, i], clean_up_tokenization_spaces=False)
        return text[len(base) :].encode()

    return [read(i) for i in range(count)]


def _byte_characters() -> dict[int, str]:
    """The characters by which byte-level BPE writes bytes: printable ones as they are, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + n) for n, byte in enumerate(others)
    }


def _byte_classes(ignore_case: bool, word_start: bool) -> bytes:
    """A table for ``bytes.translate``: bytes of the same class count as the same."""
    classes = bytes(range(256))
    if ignore_case:
        classes = classes.lower()
    if word_start:
        classes = re.sub(rb"[^A-Za-z0-9_]", b" ", classes)
    return classes


def _texts(phrases: Iterable[str]) -> list[str]:
    if isinstance(phrases, str):
        raise ValueError(f"phrases: the text {phrases!r}, expected a list of texts")
    texts = list(phrases)
    if not texts or not all(texts):
        raise ValueError(f"phrases: {texts!r}, expected at least one text, and none of them empty")
    return texts


def _transitions(
    prefixes: list[bytes], index: dict[bytes, int], endings: list[list[int]]
) -> Tensor:
    """(states, 256): the longest end of state + byte that is a state. Shorter states come first, as theirs are used."""
    table = torch.zeros(len(prefixes), 256, dtype=torch.int64)  # the state of b"" is 0
    longer: dict[bytes, list[bytes]] = {prefix: [] for prefix in prefixes}
    for prefix in prefixes[1:]:
        longer[prefix[:-1]].append(prefix)
    for prefix in sorted(prefixes, key=len):
        state = index[prefix]
        if prefix:
            table[state] = table[endings[state][1]]  # endings[state][0] is the state itself
        for child in longer[prefix]:
            table[state, child[-1]] = index[child]
    return table
