"""Batches of annotated texts: tokens, labels, weights and negative ids, padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tnt_kernels.annotate import (
    NegativePhrases,
    token_bytes,
    token_offsets,
    weights_from_correction,
    weights_from_spans,
)
from tnt_kernels.hf.rows import IGNORED

#: The columns that examples may have, beside the model's own.
COLUMNS = (
    "input_ids", "labels", "weights", "negative_ids", "ref_hidden_states", "prompt", "completion", "messages",
    "negative_spans", "negative", "corrected",
)  # fmt: skip
_KINDS = (
    "(input_ids, labels, weights), (prompt, completion, negative_spans), (messages, negative_spans) or "
    "(prompt, negative, corrected)"
)


class _Text(NamedTuple):
    """A prompt's and a completion's ids, and where the completion's tokens are in its text."""

    prompt: list[int]
    completion: list[int]
    offsets: Tensor  # (T, 2) of the completion
    text: str
    begin: int  # where annotations count from
    cut: bool  # by max_length


class _Row(NamedTuple):
    source: Tensor | None  # the encoder's ids
    ids: Tensor
    labels: Tensor
    weights: Tensor
    negative_ids: Tensor | None  # (T, K)
    ref_hidden_states: Tensor | None  # (T, H)


@dataclass
class TNTDataCollator:
    """Makes batches of examples of one of these kinds:

    - ``input_ids``, ``labels``, and ``weights`` or ``negative_ids`` (or both), in line with each other; for an
      encoder-decoder model, labels, weights and negative ids speak of the decoder's tokens. Causal models can do
      without ``labels``. Prompts have weight 0.
    - ``prompt``, ``completion`` and ``negative_spans``: texts, and the ``(begin, end)`` characters of the completion
      that are unwanted. With a list of messages as ``prompt`` (or ``messages``, the last of which is the completion),
      the chat template makes the text. An EOS is added where no template does.
    - ``prompt``, ``negative`` and ``corrected``: what the model said, and what it should have said.

    A prompt or completion can also be a list of ids, as generated: it is never tokenised again, gets no EOS, and takes
    ``negative_spans`` of the decoded text or ``weights`` for each of its ids. ``ref_hidden_states`` (T, H) may come
    with any kind.

    A batch is padded on the right. ``labels``, ``weights`` and ``negative_ids`` are in line with the tokens, the
    convention of transformers: :class:`TNTTrainer` shifts them. Labels are -100 wherever nothing is to be learnt, so
    that other trainers count the same rows.

    Args:
        tokenizer: needed for texts.
        model: needed for encoder-decoder models, which shift the labels into ``decoder_input_ids``.
        max_length: longer sequences lose their end; spans are clipped to what is left.
        spans: "all" or "first", as in :func:`tnt.weights_from_spans`.
        correction: "first", "diff" or "full", as in :func:`tnt.weights_from_correction`.
        phrases: gives every position all tokens that would complete an unwanted phrase, as further ``negative_ids``.
        pad_to_multiple_of: of the length.
        vocab_size: ids must be below. None: not checked (the trainer fills it in).

    Raises:
        ValueError: when called: columns that are missing, do not fit or hold what cannot be.
    """

    tokenizer: Any = None
    model: Any = None
    max_length: int | None = None
    spans: str = "all"
    correction: str = "first"
    phrases: NegativePhrases | None = None
    pad_to_multiple_of: int | None = None
    vocab_size: int | None = None
    _bytes: list[bytes] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        config = getattr(self.model, "config", None)
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        if not self.encoder_decoder:
            self.model = None  # a worker of the data loader need not have it

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [self._row(example) for example in examples]
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = self._padded([row.ids for row in rows], pad)
        labels = self._padded([row.labels for row in rows], IGNORED)
        weights = self._padded([row.weights for row in rows], 0.0)
        if not self.encoder_decoder:
            labels[:, :1] = IGNORED  # nothing predicts the first token
        labels[weights == 0] = IGNORED
        weights[labels == IGNORED] = 0.0
        if self.encoder_decoder:
            sources = [row.source for row in rows if row.source is not None]
            batch = {
                "input_ids": self._padded(sources, pad),
                "attention_mask": self._padded([torch.ones_like(x) for x in sources], 0),
                "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels=ids),
            }
        else:
            mask = self._padded([torch.ones_like(row.ids) for row in rows], 0)
            batch = {"input_ids": ids, "attention_mask": mask}
        batch |= {"labels": labels, "weights": weights}
        negative_ids = self._negative_ids(rows, labels)
        if negative_ids is not None:
            batch["negative_ids"] = negative_ids
        hidden = [row.ref_hidden_states for row in rows if row.ref_hidden_states is not None]
        if hidden:
            if len(hidden) < len(rows):
                raise ValueError(
                    f"ref_hidden_states: in {len(hidden)} of {len(rows)} examples, expected in all or in none"
                )
            batch["ref_hidden_states"] = self._padded(hidden, 0.0)
        self._check_ids(batch)
        return batch

    def lengths(self, examples: Sequence[Mapping[str, Any]]) -> list[int]:
        """How many tokens each example has without padding; an encoder-decoder's, its decoder."""
        return [len(self._row(example).ids) for example in examples]

    def _padded(self, rows: list[Tensor], value: float) -> Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -padded.size(1) % (self.pad_to_multiple_of or 1)
        if missing:
            fill = padded.new_full((padded.size(0), missing, *padded.shape[2:]), value)
            padded = torch.cat((padded, fill), dim=1)
        return padded

    def _negative_ids(self, rows: list[_Row], labels: Tensor) -> Tensor | None:
        parts = []
        given = [row.negative_ids for row in rows]
        if any(x is not None for x in given):
            widest = max(x.size(1) for x in given if x is not None)
            full = [
                torch.full((len(row.ids), widest), -1) if x is None else _widened(x, widest)
                for row, x in zip(rows, given, strict=True)
            ]
            parts.append(self._padded(full, -1))
        if self.phrases is not None:
            parts.append(self.phrases.at(self._padded([row.ids for row in rows], -1)))
        if not parts:
            return None
        negative_ids = torch.cat(parts, dim=2)
        negative_ids[labels == IGNORED] = -1
        # No column without an id, but at least one: a batch without negatives is no batch without annotations.
        widest = max(1, int((negative_ids >= 0).sum(dim=2).max())) if negative_ids.numel() else 0
        return negative_ids.sort(dim=2, descending=True).values[:, :, :widest].contiguous()

    def _check_ids(self, batch: dict[str, Tensor]) -> None:
        if self.vocab_size is None:
            return
        for name in ("input_ids", "decoder_input_ids", "labels", "negative_ids"):
            if name in batch and batch[name].numel() and int(batch[name].max()) >= self.vocab_size:
                raise ValueError(
                    f"{name}: holds the id {int(batch[name].max())}, expected ids below {self.vocab_size}, the size "
                    "of the vocabulary that the model and its reference share"
                )

    # --- One example ------------------------------------------------------------------------------

    def _row(self, example: Mapping[str, Any]) -> _Row:
        found = {name for name, value in example.items() if value is not None}
        if "input_ids" in found:
            return self._of_ids(example, found)
        if "messages" in found and example["messages"]:
            messages = example["messages"]
            example = {**example, "prompt": messages[:-1], "completion": messages[-1:]}
            found |= {"prompt", "completion"}
        said = "completion" if "completion" in found else "negative"
        if not {"prompt", said} <= found or (said == "negative" and "corrected" not in found):
            raise ValueError(f"examples: found {_names(found)}, expected {_KINDS}")
        annotated = found & {"negative_spans", "weights", "negative_ids", "corrected"}
        if not annotated and self.phrases is None:
            raise ValueError(
                f"examples: found {_names(found)}, nothing that says what is unwanted; expected {_KINDS}"
            )
        text = self._encode(example["prompt"], example[said])
        if said == "negative":
            corrected = self._encode(example["prompt"], example["corrected"])
            weights = weights_from_correction(
                text.completion, corrected.completion, self.correction, pad_id=-1
            )
        elif "weights" in found:
            weights = _reals("weights", example["weights"])
            weights = weights[: len(text.completion)] if text.cut else weights
            _check_length("weights", weights, len(text.completion), "the completion's ids")
        else:
            spans = self._clipped(example.get("negative_spans") or [], text)
            mask = torch.ones(len(text.completion))
            weights = weights_from_spans(text.offsets, spans, self.spans, mask=mask)
        negative_ids = None
        if "negative_ids" in found:
            negative_ids = _table(example["negative_ids"])
            negative_ids = negative_ids[: len(text.completion)] if text.cut else negative_ids
            _check_length(
                "negative_ids", negative_ids, len(text.completion), "the completion's ids"
            )
        completion, prompt = torch.tensor(text.completion).long(), torch.tensor(text.prompt).long()
        hidden = _hidden(example)
        if self.encoder_decoder:
            return _checked(_Row(prompt, completion, completion, weights, negative_ids, hidden))
        ids = torch.cat((prompt, completion))
        labels = torch.cat((torch.full_like(prompt, IGNORED), completion))
        weights = torch.cat((torch.zeros(len(prompt)), weights))
        if negative_ids is not None:
            before = torch.full((len(prompt), negative_ids.size(1)), -1)
            negative_ids = torch.cat((before, negative_ids))
        return _checked(_Row(None, ids, labels, weights, negative_ids, hidden))

    def _of_ids(self, example: Mapping[str, Any], found: set[str]) -> _Row:
        if not found & {"weights", "negative_ids"} and self.phrases is None:
            raise ValueError(
                f"examples: found {_names(found)}, neither weights nor negative_ids; expected {_KINDS}"
            )
        if self.encoder_decoder and "labels" not in found:
            raise ValueError(
                f"examples: found {_names(found)}, expected labels, the decoder's tokens"
            )
        source = torch.as_tensor(example["input_ids"]).long()
        ids = torch.as_tensor(example["labels"]).long() if self.encoder_decoder else source
        labels = torch.as_tensor(example["labels"]).long() if "labels" in found else ids
        weights = torch.ones(len(labels))
        if "weights" in found:
            weights = _reals("weights", example["weights"])
        _check_length("labels", labels, len(ids), "input_ids")
        _check_length("weights", weights, len(labels), "labels")
        negative_ids = _table(example["negative_ids"]) if "negative_ids" in found else None
        if negative_ids is not None:
            _check_length("negative_ids", negative_ids, len(labels), "labels")
        if self.encoder_decoder and bool((ids < 0).any()):
            kept = int((ids >= 0).sum())
            if bool((ids[:kept] < 0).any()):
                raise ValueError(
                    "labels: -100 before the last token of an encoder-decoder's example, which hides what its decoder "
                    "is to read; expected the true ids, with weight 0 where nothing is to be learnt"
                )
            ids, labels, weights = ids[:kept], labels[:kept], weights[:kept]
            negative_ids = None if negative_ids is None else negative_ids[:kept]
        most = slice(self.max_length)
        negative_ids = None if negative_ids is None else negative_ids[most]
        return _checked(
            _Row(source[most] if self.encoder_decoder else None, ids[most], labels[most], weights[most],
                 negative_ids, _hidden(example))
        )  # fmt: skip

    def _encode(self, prompt: Any, completion: Any) -> _Text:
        if self.tokenizer is None:
            raise ValueError("tokenizer: None, expected a tokenizer, because examples have prompts")
        if _is_ids(completion):
            ids = prompt if _is_ids(prompt) else self.tokenizer(prompt)["input_ids"]
            return self._of_generated([int(i) for i in ids], [int(i) for i in completion])
        if _is_ids(prompt):
            raise ValueError("completion: a text behind a prompt of ids, expected ids too")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer: {type(self.tokenizer).__name__} gives no offsets, expected a fast tokenizer, or examples "
                "of input_ids and weights"
            )
        begin, eos = 0, self.tokenizer.eos_token_id
        if not isinstance(prompt, str):
            prompt, completion, begin = self._of_chat(prompt, completion)
            eos = None  # the template's business
        elif not isinstance(completion, str):
            raise ValueError("completion: messages behind a prompt that is a text, expected a text")
        if self.encoder_decoder:
            prompt_ids = self.tokenizer(prompt)["input_ids"][: self.max_length]
            encoded = self.tokenizer(
                text_target=completion, add_special_tokens=False, return_offsets_mapping=True
            )
            ids, offsets = list(encoded["input_ids"]), torch.tensor(encoded["offset_mapping"])
            start = 0
        else:
            # Together, as a completion of its own might be tokenised as the beginning of a text.
            chat = eos is None and begin > 0
            encoded = self.tokenizer(
                prompt + completion, add_special_tokens=not chat, return_offsets_mapping=True
            )
            ids, offsets = list(encoded["input_ids"]), torch.tensor(encoded["offset_mapping"])
            offsets = offsets.view(-1, 2)
            if ids and ids[-1] == eos and int(offsets[-1, 1]) == 0:
                ids, offsets = ids[:-1], offsets[:-1]
            behind = (offsets[:, 1] > len(prompt)).nonzero()
            start = int(behind[0]) if len(behind) else len(ids)
            prompt_ids, ids = ids[:start], ids[start:]
            offsets = (offsets[start:] - len(prompt)).clamp(min=0)
        offsets = offsets.view(-1, 2)
        if eos is not None:
            ids.append(eos)
            end = torch.full((1, 2), len(completion))
            offsets = torch.cat((offsets, end))
        return self._cut(_Text(prompt_ids, ids, offsets, completion, begin, False))

    def _of_chat(self, prompt: Any, completion: Any) -> tuple[str, str, int]:
        """Prompt and completion as the chat template writes them, and where in it the content begins."""
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if len(completion) != 1:
            raise ValueError(f"completion: {len(completion)} messages, expected one")
        template = self.tokenizer.apply_chat_template
        before: str = template(list(prompt), tokenize=False, add_generation_prompt=True)
        whole: str = template([*prompt, *completion], tokenize=False)
        if not whole.startswith(before):
            raise ValueError(
                "prompt: the chat template writes it in another way once the completion follows; expected a template "
                "whose text of the prompt is the beginning of the whole"
            )
        behind, content = whole[len(before) :], completion[0]["content"]
        begin = behind.find(content)
        if begin < 0:
            raise ValueError(
                "completion: the chat template changes its content, so that spans do not fit"
            )
        return before, behind, begin

    def _of_generated(self, prompt: list[int], completion: list[int]) -> _Text:
        """Offsets of ids as they are, in the text that ``decode(ids, skip_special_tokens=True)`` gives."""
        if self._bytes is None:
            self._bytes = token_bytes(self.tokenizer)
        tokens = [self._bytes[i] if 0 <= i < len(self._bytes) else b"\0" for i in completion]
        tokens = [b"" if token == b"\0" else token for token in tokens]
        text = b"".join(tokens).decode("utf-8", "replace")
        decoded = self.tokenizer.decode(completion, skip_special_tokens=True)
        offsets = token_offsets(tokens)
        if (
            text != decoded and text[1:] == decoded
        ):  # decoding drops the space before the first word
            text, offsets = decoded, (offsets - 1).clamp(min=0)
        return self._cut(_Text(prompt, completion, offsets, text, 0, False))

    def _cut(self, text: _Text) -> _Text:
        if self.max_length is None:
            return text
        room = self.max_length - (0 if self.encoder_decoder else len(text.prompt))
        if len(text.completion) <= room:
            return text
        room = max(0, room)
        return text._replace(
            prompt=text.prompt[: self.max_length],
            completion=text.completion[:room],
            offsets=text.offsets[:room],
            cut=True,
        )

    def _clipped(self, spans: Sequence[Sequence[int]], text: _Text) -> list[tuple[int, int]]:
        length = len(text.text) - text.begin
        end = int(text.offsets[:, 1].max()) if len(text.offsets) else 0
        clipped = []
        for begin, stop in spans:
            if not 0 <= begin < stop <= length:
                raise ValueError(
                    f"negative_spans: ({begin}, {stop}) in a completion of {length} characters, expected "
                    "0 <= begin < end <= length"
                )
            begin, stop = begin + text.begin, stop + text.begin
            if text.cut:
                stop = min(stop, end)
            if begin < stop:
                clipped.append((int(begin), int(stop)))
        return clipped


def _is_ids(x: Any) -> bool:
    return isinstance(x, Tensor) or (
        not isinstance(x, str) and all(isinstance(i, int) or hasattr(i, "__index__") for i in x)
    )


def _names(found: set[str]) -> str:
    return f"the columns {', '.join(sorted(found))}" if found else "no columns"


def _reals(name: str, x: Any) -> Tensor:
    values = torch.as_tensor(x)
    if values.dim() != 1:
        raise ValueError(f"{name}: shape {tuple(values.shape)}, expected (T,)")
    return values.float()


def _table(x: Any) -> Tensor:
    """Lists of ids, of any lengths, as (T, K)."""
    if isinstance(x, Tensor) and x.dim() == 2:
        return x.long()
    rows = [torch.as_tensor(row).long().view(-1) for row in x]
    return (
        pad_sequence(rows, batch_first=True, padding_value=-1) if rows else torch.empty(0, 0).long()
    )


def _widened(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.size(1)), value=-1)


def _hidden(example: Mapping[str, Any]) -> Tensor | None:
    hidden = example.get("ref_hidden_states")
    return None if hidden is None else torch.as_tensor(hidden)


def _check_length(name: str, x: Tensor, length: int, of: str) -> None:
    if len(x) != length:
        raise ValueError(f"{name}: {len(x)} of them, expected {length}, as many as {of}")


def _checked(row: _Row) -> _Row:
    if row.ref_hidden_states is not None:
        _check_length("ref_hidden_states", row.ref_hidden_states, len(row.ids), "the tokens")
    return row
