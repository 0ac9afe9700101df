"""From texts, chats and generated ids to tokens, and where each token is in its text."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnt_kernels.annotate import token_bytes, token_offsets

_Span = tuple[int, int]

#: Keywords of ``apply_chat_template`` that say how to tokenise; these are no business of a caller.
_RESERVED = frozenset({
    "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs",
})  # fmt: skip
#: So many tokens with text may share the same characters, where a decoder changes what they say by themselves.
_MOST_IN_A_GROUP = 8


class Ends(NamedTuple):
    """What ends a text that a model says."""

    ids: frozenset[int]  # every id that ends what the model says
    pad: int | None
    stop_strings: tuple[str, ...]


def ends_of(tokenizer: Any, generation_config: Any = None) -> Ends:
    """The ends, the padding and the stop strings of ``generate``, and the tokenizer's own EOS.

    Args:
        tokenizer: its ``eos_token_id`` is always an end; its ``pad_token_id`` counts where the config names none.
        generation_config: a model's. None: only the tokenizer's ids.
    """
    eos = getattr(generation_config, "eos_token_id", None)
    ids = set() if eos is None else {int(i) for i in torch.as_tensor(eos).view(-1)}
    own = getattr(tokenizer, "eos_token_id", None)
    if own is not None:
        ids.add(int(own))
    pad = getattr(generation_config, "pad_token_id", None)
    if pad is None:
        pad = getattr(tokenizer, "pad_token_id", None)
    stops = getattr(generation_config, "stop_strings", None) or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    added = tokenizer.get_added_vocab() if stops and hasattr(tokenizer, "get_added_vocab") else {}
    ids |= {int(added[stop]) for stop in stops if stop in added}
    return Ends(frozenset(ids), None if pad is None else int(pad), stops)


class Text(NamedTuple):
    """An example's tokens."""

    prompt: list[int]  # for an encoder-decoder model: the encoder's ids
    completion: list[int]
    offsets: Tensor  # (T, 2) int64: characters of each completion token; (n, n): no text
    spans: list[_Span]  # the unwanted characters, in the coordinates of offsets
    said: Tensor  # (T,) bool: False for tokens behind the end, which no model says


class _Encoded(NamedTuple):
    """A text's tokens, and what the tokenizer's post-processor puts around them."""

    prefix: list[int]
    ids: list[int]
    offsets: list[_Span]
    suffix: list[int]


class Texts:
    """Tokenises prompts and completions as a model reads and says them.

    A prompt is a text, a list of messages or ids; a completion is a text, a list of one message or generated ids.
    The chat template makes the text of messages, and what it makes is tokenised as it is. Around other texts stands
    what the tokenizer's post-processor puts there, once, but nothing between a causal prompt and its completion.
    Generated ids are never tokenised again.

    Args:
        tokenizer: a Hugging Face tokenizer.
        encoder_decoder: whether prompt and completion are two texts, of an encoder and of a decoder.
        ends: what ends a completion. None: what the tokenizer knows of it.
    """

    def __init__(
        self, tokenizer: Any, encoder_decoder: bool = False, ends: Ends | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.ends = ends_of(tokenizer) if ends is None else ends

    def encode(
        self, prompt: Any, completion: Any, spans: Sequence[Sequence[int]] = (), **template: Any
    ) -> Text:
        """The tokens of a prompt and its completion.

        Args:
            prompt: a text, a list of messages, or ids: a list of integers or a tensor (T,).
            completion: a text, a list of one message, or ids as generated.
            spans: the ``(begin, end)`` characters of the completion that are unwanted: of the text, of the content of
                the message, or of ``decode(ids, skip_special_tokens=True)``.
            template: further keywords of ``apply_chat_template``, as ``tools``; texts and ids have no use for them.

        Raises:
            ValueError: no tokenizer, or one that gives no offsets; a kind of prompt and a kind of completion that do
                not go together; spans that are not inside the completion, that the chat template does not write, or
                that are behind the end.
        """
        pairs = [_pair(span) for span in spans]
        if _is_ids(completion):
            said = _ids("completion", completion)
            return self._of_generated(self.prompt_ids(prompt, **template), said, pairs)
        if _is_ids(prompt):
            raise ValueError("completion: a text behind a prompt of ids, expected ids too")
        self._check_tokenizer(offsets=True)
        if not isinstance(prompt, str):
            return self._of_chat(list(prompt), completion, pairs, template)
        if not isinstance(completion, str):
            raise ValueError("completion: messages behind a prompt that is a text, expected a text")
        _check_spans(pairs, len(completion))
        if self.encoder_decoder:
            source = self.prompt_ids(prompt)
            target = self._encoded(completion, special=True, target=True)
        else:
            # Together, as a completion of its own might be tokenised as the beginning of a text.
            whole = self._encoded(prompt + completion, special=True)
            source, target = self._split(whole, len(prompt))
            source = _without_overlap(whole.prefix, whole.ids) + source
            target = target._replace(prefix=[])
        eos = self.tokenizer.eos_token_id
        prefix = _without_overlap(target.prefix, target.ids)
        suffix = self._suffix(target, [] if eos is None else [int(eos)])
        ids = [*prefix, *target.ids, *suffix]
        end = (len(completion), len(completion))
        offsets = [(0, 0)] * len(prefix) + target.offsets + [end] * len(suffix)
        return self._text(source, ids, offsets, pairs, completion)

    def prompt_ids(self, prompt: Any, **template: Any) -> list[int]:
        """The ids of a prompt, as ``generate`` gets them.

        Args:
            prompt: a text, a list of messages or ids.
            template: further keywords of ``apply_chat_template``.

        Raises:
            ValueError: no tokenizer, or keywords that are not the template's.
        """
        self._check_tokenizer()
        if _is_ids(prompt):
            return _ids("prompt", prompt)
        if not isinstance(prompt, str):
            before = self._render(list(prompt), template, add_generation_prompt=True)
            return self._encoded(before, special=False).ids
        found = self._encoded(prompt, special=True)
        ids = _without_overlap(found.prefix, found.ids) + found.ids
        return ids + self._suffix(found) if self.encoder_decoder else ids

    # --- The three kinds of completions -----------------------------------------------------------

    def _of_chat(
        self, prompt: list[Any], completion: Any, spans: list[_Span], template: dict[str, Any]
    ) -> Text:
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if len(completion) != 1:
            raise ValueError(f"completion: {len(completion)} messages, expected one")
        message = completion[0]
        before = self._render(prompt, template, add_generation_prompt=True)
        whole = self._render([*prompt, message], template)
        if not whole.startswith(before):
            raise ValueError(
                "prompt: the chat template writes it in another way once the completion follows; expected a template "
                "whose text of the prompt is the beginning of the whole, or a completion of ids, as generated"
            )
        content = message.get("content")

        def render(text: str) -> str:
            return self._render([*prompt, {**message, "content": text}], template)

        written = not isinstance(content, str) or content.strip() in whole[len(before) :]
        if not written and render(f"x{content}x") == whole:
            raise ValueError(
                "completion: the chat template does not write the text of a message, expected content in the form "
                "that it reads, or ids"
            )
        if spans:
            if not isinstance(content, str):
                raise ValueError(
                    f"negative_spans: in a completion whose content is {type(content).__name__}, expected a text"
                )
            _check_spans(spans, len(content))
            found = _places(render, whole, content, spans)
            spans = [(begin - len(before), end - len(before)) for begin, end in found]
        source, target = self._split(self._encoded(whole, special=False), len(before))
        if self.encoder_decoder:
            source = self._encoded(before, special=False).ids
        return self._text(source, target.ids, target.offsets, spans, whole[len(before) :])

    def _of_generated(self, prompt: list[int], completion: list[int], spans: list[_Span]) -> Text:
        text: str = self.tokenizer.decode(completion, skip_special_tokens=True)
        _check_spans(spans, len(text))
        offsets = self._offsets_by_bytes(completion, text)
        if offsets is None:
            offsets = self._offsets_by_prefixes(completion, text, bool(spans))
        return self._text(prompt, completion, offsets, spans, text, generated=True)

    def _text(
        self,
        prompt: list[int],
        completion: list[int],
        offsets: list[_Span],
        spans: list[_Span],
        text: str,
        generated: bool = False,
    ) -> Text:
        said = self._said(completion, offsets, text, generated)
        table = torch.tensor(offsets, dtype=torch.int64).view(-1, 2)
        for begin, end in spans:
            marked = (table[:, 0] < end) & (table[:, 1] > begin) & (table[:, 0] < table[:, 1])
            if bool(marked.any()) and not bool((marked & said).any()):
                raise ValueError(
                    f"negative_spans: {text[begin:end]!r} is behind the token that ends the completion, expected spans "
                    "of what a model says"
                )
        return Text(prompt, completion, table, spans, said)

    def _said(self, ids: list[int], offsets: list[_Span], text: str, generated: bool) -> Tensor:
        """Which tokens a model says: those up to the first end behind the text."""
        special = {*self._special, *self.ends.ids, self.ends.pad}
        tail = len(ids)
        while tail and (
            ids[tail - 1] in special
            or not (generated or text[slice(*offsets[tail - 1])].strip())  # as a template's newline
        ):
            tail -= 1
        said = torch.ones(len(ids), dtype=torch.bool)
        first = next((t for t in range(tail, len(ids)) if ids[t] in self.ends.ids), len(ids))
        said[first + 1 :] = False
        if generated:
            last = offsets[tail - 1][0] if tail else 0
            stops = [stop for stop in self.ends.stop_strings if stop in text]
            if any(text.rfind(stop) + len(stop) > last for stop in stops):
                said[tail:] = False  # it ended there, and an EOS behind it is padding
            if self.ends.pad not in self.ends.ids:
                said[tail:] &= torch.tensor([i != self.ends.pad for i in ids[tail:]]).bool()
        return said

    # --- What is known of the tokenizer, read when first needed: a collator should be cheap to make -------

    @cached_property
    def _added(self) -> dict[int, Any]:
        """The tokens that stand in texts as they are."""
        return dict(getattr(self.tokenizer, "added_tokens_decoder", {}))

    @cached_property
    def _special(self) -> frozenset[int]:
        """The ids that ``decode(..., skip_special_tokens=True)`` skips."""
        flagged = (i for i, token in self._added.items() if token.special)
        return frozenset({*self.tokenizer.all_special_ids, *flagged})

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        """The text of each token. None: it depends on the tokens around it."""
        try:
            return token_bytes(self.tokenizer)
        except ValueError:
            return None

    # --- Tokenising -------------------------------------------------------------------------------

    def _check_tokenizer(self, offsets: bool = False) -> None:
        if self.tokenizer is None:
            raise ValueError("tokenizer: None, expected a tokenizer, because examples have prompts")
        if offsets and not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer: {type(self.tokenizer).__name__} gives no offsets, expected a fast tokenizer, or examples "
                "of input_ids and weights"
            )

    def _render(self, messages: list[Any], template: Mapping[str, Any], **options: Any) -> str:
        reserved = sorted(_RESERVED & template.keys())
        if reserved:
            raise ValueError(
                f"{reserved[0]}: a keyword of apply_chat_template that is set here, expected tools or others that the "
                "template itself reads"
            )
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, **template, **options
        )
        return text

    def _encoded(self, text: str, special: bool, target: bool = False) -> _Encoded:
        fast = getattr(self.tokenizer, "is_fast", False)
        encoded = self.tokenizer(
            **{"text_target" if target else "text": text},
            add_special_tokens=special,
            return_special_tokens_mask=True,
            return_offsets_mapping=fast,
        )
        ids = [int(i) for i in encoded["input_ids"]]
        # 1 for what the post-processor adds; special tokens that the text itself holds have 0.
        added = encoded["special_tokens_mask"] if special else [0] * len(ids)
        own = [t for t, by_it in enumerate(added) if not by_it]
        begin, end = (own[0], own[-1] + 1) if own else (0, 0)
        if not own and text != "a":
            around = self._encoded("a", special, target) if special else None
            begin = end = len(around.prefix) if around else 0
        offsets = [(int(b), int(e)) for b, e in encoded["offset_mapping"]] if fast else []
        offsets = self._trimmed(text, ids[begin:end], offsets[begin:end])
        return _Encoded(ids[:begin], ids[begin:end], offsets, ids[end:])

    def _trimmed(self, text: str, ids: list[int], offsets: list[_Span]) -> list[_Span]:
        """Offsets without what is not the token's own.

        Some added tokens swallow the white space around them. A word begins with a space that the tokenizer adds; as a
        token of its own, that has the offsets of the first letter.
        """
        trimmed = []
        for t, (begin, end) in enumerate(offsets):
            covered = text[begin:end]
            if ids[t] in self._added and covered.strip():
                begin += len(covered) - len(covered.lstrip())
                end -= len(covered) - len(covered.rstrip())
            elif covered.strip() and t + 1 < len(offsets) and offsets[t + 1][0] < end:
                end = end if self.tokenizer.decode([ids[t]]).strip() else begin
            trimmed.append((begin, end))
        return trimmed

    def _split(self, whole: _Encoded, length: int) -> tuple[list[int], _Encoded]:
        """The ids before a place in the text, and what is behind it; a token across it is behind."""
        ids, offsets = whole.ids, whole.offsets
        start = next((t for t, (_, end) in enumerate(offsets) if end > length), len(ids))
        behind = [(max(b - length, 0), max(e - length, 0)) for b, e in offsets[start:]]
        return ids[:start], whole._replace(ids=ids[start:], offsets=behind)

    def _suffix(self, text: _Encoded, default: Sequence[int] = ()) -> list[int]:
        """What is still to be put behind a text, so that it ends once; ``default`` where nothing would be."""
        suffix = text.suffix or list(default)
        last = text.ids[-1] if text.ids else None
        if last not in suffix and last not in self.ends.ids:
            return suffix
        same = {last} if last in suffix else self.ends.ids
        first = next((n for n, i in enumerate(suffix) if i in same), -1)
        return suffix[first + 1 :]

    # --- Where generated ids are in their text ----------------------------------------------------

    def _offsets_by_bytes(self, ids: list[int], text: str) -> list[_Span] | None:
        """None: the bytes of the tokens are not the text."""
        if self._bytes is None:
            return None
        known = self._bytes
        tokens = [known[i] if i < len(known) and i not in self._special else b"" for i in ids]
        joined = b"".join(tokens).decode("utf-8", "replace")
        offsets = token_offsets(tokens)
        if joined.strip(" ") != text.strip(" "):
            return None
        dropped = len(joined) - len(joined.lstrip(" ")) - (len(text) - len(text.lstrip(" ")))
        return [(b, e) for b, e in (offsets - dropped).clamp(0, len(text)).tolist()]

    def _offsets_by_prefixes(self, ids: list[int], text: str, strict: bool) -> list[_Span]:
        """A group of tokens ends where what is decoded so far is the beginning of the whole text."""
        offsets: list[_Span] = []
        group: list[int] = []
        done = 0
        for n, i in enumerate(ids, 1):
            group.append(i)
            known = [j for j in group if j not in self._special]
            if strict and len(known) > _MOST_IN_A_GROUP:
                raise ValueError(
                    f"negative_spans: the tokenizer {type(self.tokenizer).__name__} decodes the tokens "
                    f"{self.tokenizer.convert_ids_to_tokens(known)} in another way than what is before and behind "
                    "them, so that their characters cannot be told apart; expected weights, one for each id"
                )
            read: str = self.tokenizer.decode(ids[:n], skip_special_tokens=True)
            if n == len(ids) or (text.startswith(read) and len(read) > done):
                offsets += [(done, done if j in self._special else len(read)) for j in group]
                group, done = [], len(read)
        return offsets


# --- Where spans are in a chat ----------------------------------------------------------------------


def _places(
    render: Callable[[str], str], plain: str, content: str, spans: Sequence[_Span]
) -> list[_Span]:
    """Where spans of a content are in the text that a chat template makes of it.

    Says so by the template itself: it renders the content with characters put into it that are nowhere else, and what
    it writes without them must be what it writes of the content as it is.

    Args:
        render: the template, with what is to be the content.
        plain: what it makes of ``content``.
        content: what the spans count in.
        spans: pairs of characters.
    """
    free = (chr(i) for i in range(0xE000, 0xF900) if chr(i) not in plain and chr(i) not in content)
    some = dict(zip(sorted({place for span in spans for place in span}), free, strict=False))

    def found(marks: Mapping[int, str]) -> dict[int, int] | None:
        """Where the template puts some places of the content. None: not as they are, or not there, or twice."""
        pieces, last = [], 0
        for place, mark in sorted(marks.items()):
            pieces += [content[last:place], mark]
            last = place
        text = render("".join(pieces) + content[last:])
        where = {text.find(mark): place for place, mark in marks.items()}
        if len(where) < len(marks) or any(text.count(mark) != 1 for mark in marks.values()):
            return None
        for mark in marks.values():
            text = text.replace(mark, "")
        if text != plain:
            return None
        return {where[at]: at - before for before, at in enumerate(sorted(where))}

    mark = next(iter(some.values()))  # one does for places that are looked for one at a time

    def one(place: int) -> int | None:
        places = found({place: mark})
        return None if places is None else places[place]

    together = found(some) if all(p in some for span in spans for p in span) else None
    placed = []
    for begin, end in spans:
        if together is not None:
            low, high = together[begin], together[end]
        else:
            low, high = _clipped(one, content, begin, end)
        if low >= high:
            raise ValueError(
                f"negative_spans: ({begin}, {end}), {content[begin:end]!r}: the chat template trims it, "
                "expected a span of which something is left"
            )
        placed.append((low, high))
    return placed


def _clipped(
    place: Callable[[int], int | None], content: str, begin: int, end: int
) -> tuple[int, int]:
    """A span's place in the text, without the white space at its ends that the template trims."""
    text = content[begin:end]
    first = begin + len(text) - len(text.lstrip())
    last = begin + len(text.rstrip()) if text.strip() else begin
    low, high = _nearest(place, begin, first), _nearest(place, end, last)
    if low is None or high is None:
        if not text.strip():
            return 0, 0
        raise ValueError(
            f"negative_spans: ({begin}, {end}), {text!r}: the chat template does not write the content there as it is, "
            "so that the place of the span cannot be verified; expected a span of what it leaves as it is"
        )
    return low, high


def _nearest(place: Callable[[int], int | None], wanted: int, limit: int) -> int | None:
    """The place nearest to ``wanted`` that the template keeps, if ``limit`` is kept, by bisection."""
    found = place(wanted)
    if found is not None or wanted == limit:
        return found
    found = place(limit)
    while found is not None and abs(limit - wanted) > 1:
        middle = (wanted + limit) // 2
        at = place(middle)
        if at is None:
            wanted = middle
        else:
            limit, found = middle, at
    return found


# --- Arguments --------------------------------------------------------------------------------------


def _is_ids(x: Any) -> bool:
    return isinstance(x, Tensor) or (
        not isinstance(x, str) and all(isinstance(i, int) or hasattr(i, "__index__") for i in x)
    )


def _ids(name: str, x: Any) -> list[int]:
    ids = torch.as_tensor(x)
    if ids.numel() == 0:
        ids = ids.long()
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(f"{name}: shape {tuple(ids.shape)}, {ids.dtype}, expected integers (T,)")
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"{name}: holds the id {int(ids.min())}, expected ids of the tokenizer")
    return [int(i) for i in ids]


def _pair(span: Sequence[int]) -> _Span:
    try:
        begin, end = (operator.index(x) for x in span)
    except (TypeError, ValueError):
        raise ValueError(f"negative_spans: {span!r}, expected pairs of integers") from None
    return begin, end


def _check_spans(spans: Sequence[_Span], length: int) -> None:
    for begin, end in spans:
        if not 0 <= begin < end <= length:
            raise ValueError(
                f"negative_spans: ({begin}, {end}) in a completion of {length} characters, expected "
                "0 <= begin < end <= length"
            )


def _without_overlap(prefix: list[int], ids: list[int]) -> list[int]:
    """What of ``prefix`` is still to be put before ``ids``, whose beginning may be the end of it already."""
    most = min(len(prefix), len(ids))
    overlap = next((n for n in range(most, 0, -1) if prefix[-n:] == ids[:n]), 0)
    return prefix[: len(prefix) - overlap]
