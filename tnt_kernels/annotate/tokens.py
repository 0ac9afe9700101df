"""What each token of a tokenizer adds to the text, as bytes, and where tokens are in a text."""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BOUNDARY = b"\0"  # in no phrase


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token of a tokenizer's vocabulary adds to the text, as bytes.

    Read off the tokenizer's decoder, and verified: what some random and some usual tokens decode to must be their bytes
    one after another, up to spaces at the ends.

    Special tokens, which are not text, are ``b"\\0"``: no phrase reaches across them.

    Args:
        tokenizer: a Hugging Face tokenizer, or one of the ``tokenizers`` package.

    Raises:
        ValueError: what the tokens add to the text depends on their neighbours.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend = getattr(backend, "_tokenizer", backend)  # of ByteLevelBPETokenizer and its like
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        names = tokenizer.convert_ids_to_tokens(list(range(_size(tokenizer, len(tokenizer)))))
        special = set(tokenizer.all_special_ids)
    else:
        size = _size(tokenizer, tokenizer.get_vocab_size())
        names = [tokenizer.id_to_token(i) for i in range(size)]
        special = set()
    if hasattr(backend, "get_added_tokens_decoder"):
        added = backend.get_added_tokens_decoder()
        special |= {i for i, token in added.items() if token.special}
    known = [i for i, name in enumerate(names) if name is not None and i not in special]
    if hasattr(backend, "decoder"):
        decoder = backend.decoder
        kinds = _kinds(decoder)
        read = _by_decoder(
            [names[i] for i in known], kinds, " ".join if decoder is None else decoder.decode
        )
    else:
        kinds = ["none"]
        read = _by_decoding(tokenizer, known)
    tokens = [BOUNDARY] * len(names)
    for i, data in zip(known, read or [], strict=False):
        tokens[i] = data
    wrong = (
        "what a token adds cannot be told" if read is None else _mistake(tokenizer, tokens, known)
    )
    if wrong:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} with the decoder {', '.join(kinds)}: {wrong}; expected a tokenizer "
            "whose tokens add the same text wherever they are"
        )
    return tokens


def token_offsets(tokens: Sequence[bytes]) -> Tensor:
    """(T, 2) int64: where each token begins and ends in the text, counted in characters.

    Args:
        tokens: the bytes of each token of a text. What is no UTF-8 counts as U+FFFD, as in ``decode``. One that holds
            a part of a character's bytes covers that character; one without bytes covers nothing.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, done = [], 0
    for token in tokens:
        begin = done
        done += len(decoder.decode(token))
        offsets.append((begin, done + bool(token and decoder.getstate()[0])))
    return torch.tensor(offsets, dtype=torch.int64).view(-1, 2)


def _size(tokenizer: Any, count: int) -> int:
    """One more than the highest id: a vocabulary may have gaps."""
    vocab = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(count, 1 + max(vocab.values(), default=-1))


def _kinds(decoder: Any) -> list[str]:
    """The kinds of decoder of a ``tokenizers.Tokenizer``, in their order."""
    if decoder is None:
        return ["none"]
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:  # one written in Python
        return [type(decoder).__name__]
    return [part["type"] for part in state.get("decoders", [state])]


def _by_decoder(
    names: list[str], kinds: list[str], decode: Callable[[list[str]], str]
) -> list[bytes] | None:
    """What a decoder makes of each token between two others that no vocabulary has. None: not to be told apart.

    All of them at once, as a decoder takes any tokens: what they add depends, if at all, on whether they are the first
    or the last. Tokens that are parts of a character go by the rules of byte-level BPE and of byte fallback, as they
    decode to nothing by themselves.
    """
    used = set("".join(names))
    mark = next(chr(i) for i in range(0xE000, 0x110000) if chr(i) not in used)
    gap = decode([mark, mark]).partition(mark)[2].partition(mark)[0]  # what the mark itself adds
    between = [mark] * (2 * len(names) + 1)
    between[1::2] = names
    pieces = decode(between).split(mark)[1:-1]
    if len(pieces) != len(names) or not all(piece.endswith(gap) for piece in pieces):
        return None
    characters = {character: bytes([byte]) for byte, character in _byte_characters().items()}

    def read(name: str, piece: str) -> bytes:
        if "\ufffd" in piece:
            if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
                return bytes([int(name[3:5], 16)])
            if "ByteLevel" in kinds and all(c in characters for c in name):
                return b"".join(characters[c] for c in name)
        return piece[: len(piece) - len(gap)].encode()

    return [read(name, piece) for name, piece in zip(names, pieces, strict=True)]


def _by_decoding(tokenizer: Any, known: list[int]) -> list[bytes] | None:
    """Of a tokenizer that says nothing of its decoder: what a token adds behind another one."""
    base = tokenizer.decode(known[:1], clean_up_tokenization_spaces=False)
    texts = [
        tokenizer.decode([known[0], i], clean_up_tokenization_spaces=False)[len(base) :]
        for i in known
    ]
    whole = not any("\ufffd" in text for text in texts)  # no part of a character
    return [text.encode() for text in texts] if whole else None


# Contractions and punctuation, which some tokenizers clean up, and characters of two to four bytes.
_SAMPLE = "The cat's mat, isn't it? I don't: we've \xe9t\xe9 \u2014 \U0001f600, they're!"


def _mistake(tokenizer: Any, tokens: list[bytes], known: list[int]) -> str | None:
    """What decodes to something other than its bytes, in words, of a sample that is always the same."""
    wrapped = hasattr(tokenizer, "convert_ids_to_tokens")
    raw = {"clean_up_tokenization_spaces": False} if wrapped else {}

    def differs(ids: list[int], text: str) -> str | None:
        if _agree([tokens[i] for i in ids], text):
            return None
        return (
            f"the tokens {[tokens[i].decode('utf-8', 'replace') for i in ids]} decode to {text!r}"
        )

    whole = [i for i in known if _is_utf8(tokens[i])]
    short = [i for i in whole if len(tokens[i]) <= 2]  # punctuation, which decoders clean up
    index = {tokens[i]: i for i in known if len(tokens[i]) == 1}
    texts = [character.encode() for character in "\xe9\u2014\U0001f600"]
    parts = [[index.get(bytes([b]), -1) for b in text] for text in texts]
    parts = [ids for ids in parts if min(ids) >= 0]
    # Some decoders treat the first token in another way, as one of WordPiece that continues a word.
    visible = (i for i in whole if tokens[i].strip(b" "))
    first = next((i for i in visible if _agree([tokens[i]], tokenizer.decode([i], **raw))), None)
    if first is None:
        return "no token decodes to its bytes"
    draw = random.Random(0)
    for n in range(64):
        ids = [first, *draw.choices(short if short and n % 2 else whole, k=12)]
        if parts:
            ids += [*parts[n % len(parts)], first]
        wrong = differs(ids, tokenizer.decode(ids, **raw))
        if wrong:
            return wrong
    if not callable(tokenizer):
        return None
    try:
        said = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    except Exception:  # a vocabulary without these characters, and without an unknown token
        return None
    text, kept = tokenizer.decode(said, skip_special_tokens=True), set(known)
    wrong = differs([i for i in said if i in kept], text)
    if wrong and text != tokenizer.decode(said, skip_special_tokens=True, **raw):
        wrong += ", unless its clean_up_tokenization_spaces is False"
    return wrong


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _agree(tokens: list[bytes], text: str) -> bool:
    """Whether a text is what the tokens say, but for spaces at its ends."""
    return b"".join(tokens).decode("utf-8", "replace").strip(" ") == text.strip(" ")


def _byte_characters() -> dict[int, str]:
    """The characters by which byte-level BPE writes bytes: printable ones as they are, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + n) for n, byte in enumerate(others)
    }
