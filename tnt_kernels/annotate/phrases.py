"""Negative ids: all the tokens that would complete an unwanted phrase."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnt_kernels.annotate.tokens import BOUNDARY, token_bytes


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
        self._outside = BOUNDARY.translate(classes)
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
