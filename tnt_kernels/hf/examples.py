"""One example of the data: its tokens, labels, weights and negative ids, and what else the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tnt_kernels.annotate import weights_from_correction, weights_from_spans
from tnt_kernels.hf.rows import IGNORED
from tnt_kernels.hf.texts import Text, Texts

#: The columns that examples may have, beside the model's own.
COLUMNS = (
    "input_ids", "labels", "weights", "negative_ids", "ref_hidden_states", "prompt", "completion", "messages",
    "negative_spans", "negative", "corrected", "tools", "chat_template_kwargs", "cu_seq_lens_q",
)  # fmt: skip
_KINDS = (
    "(input_ids, labels, weights), (prompt, completion, negative_spans), (messages, negative_spans) or "
    "(prompt, negative, corrected)"
)
#: What models take beside ids, where the model is not known.
_USUAL = frozenset(
    ("attention_mask", "position_ids", "token_type_ids", "decoder_input_ids", "decoder_attention_mask", "pixel_values")
)  # fmt: skip
#: What of it has a number for each token; others whose names end so speak of images and sounds.
_OF_TOKENS = frozenset(
    ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
)
#: What forwards take and no example can have.
_OTHERS = (
    "inputs_embeds", "decoder_inputs_embeds", "past_key_values", "encoder_outputs", "cache_position",
    "logits_to_keep",
)  # fmt: skip


class Row(NamedTuple):
    """One example. All but ``source`` and what goes with it is in line with ``ids``."""

    source: Tensor  # what the model reads: the encoder's ids, or ``ids``
    ids: Tensor  # the tokens that labels speak of: the decoder's, or those of a causal model
    labels: Tensor
    weights: Tensor
    negative_ids: Tensor | None  # (T, K)
    ref_hidden_states: Tensor | None  # (T, H)
    inputs: dict[str, Tensor]  # what else the model's forward takes
    lost: bool  # all rows that count have been cut off


def takes(taken: frozenset[str] | None, name: str) -> bool:
    """Whether a forward that takes that (None: it is not known what) takes the input of that name."""
    return name in (_USUAL if taken is None else taken)


@dataclass
class Reader:
    """Reads examples of the kinds that :class:`TNTDataCollator` takes.

    Args:
        texts: encodes texts, if it has a tokenizer.
        taken: what the model's forward takes. None: not known.
        encoder_decoder: whether labels speak of another text than ``input_ids``.
        max_length, spans, correction: the collator's.
        phrases: whether phrases say what is unwanted, so that examples need not.
    """

    texts: Texts
    taken: frozenset[str] | None
    encoder_decoder: bool
    max_length: int | None
    spans: str
    correction: str
    phrases: bool

    def __call__(self, example: Mapping[str, Any]) -> Row:
        found = {name for name, value in example.items() if value is not None}
        if "input_ids" in found:
            return self._of_ids(example, found)
        if "messages" in found and len(example["messages"]):
            messages = list(example["messages"])
            example = {**example, "prompt": messages[:-1], "completion": messages[-1:]}
            found |= {"prompt", "completion"}
        _check_one(found & {"completion", "negative"})
        _check_one(found & {"negative_spans", "weights", "corrected"})
        said = "completion" if "completion" in found else "negative"
        if not {"prompt", said} <= found or (said == "negative" and "corrected" not in found):
            raise ValueError(f"examples: found {_names(found)}, expected {_KINDS}")
        annotated = found & {"negative_spans", "weights", "negative_ids", "corrected"}
        if not annotated and not self.phrases:
            raise ValueError(
                f"examples: found {_names(found)}, nothing that says what is unwanted; expected {_KINDS}"
            )
        spans = example["negative_spans"] if "negative_spans" in found else ()
        text = self._encoded(example, said, spans)
        completion, prompt = (
            torch.tensor(ids, dtype=torch.int64) for ids in (text.completion, text.prompt)
        )
        if "corrected" in found:
            corrected = self._encoded(example, "corrected", ())
            weights = weights_from_correction(
                text.completion, corrected.completion, self.correction, pad_id=-1
            )
        elif "weights" in found:
            weights = _reals("weights", example["weights"])
            _check_length("weights", weights, len(completion), "the completion's ids")
        else:
            mask = torch.ones(len(completion))
            weights = weights_from_spans(text.offsets, text.spans, self.spans, mask=mask)
            if not self.encoder_decoder and len(weights) and not len(prompt) and weights[0] < 0:
                raise ValueError(
                    "negative_spans: on the first token of a text, which nothing predicts, expected a prompt before it"
                )
        weights = weights * text.said
        negative_ids = None
        if "negative_ids" in found:
            negative_ids = _table(example["negative_ids"])
            _check_length("negative_ids", negative_ids, len(completion), "the completion's ids")
        inputs = self._inputs_of(example, found, None, None)
        hidden = _hidden(example)
        if self.encoder_decoder:
            return self._cut(
                Row(prompt, completion, completion, weights, negative_ids, hidden, inputs, False)
            )
        ids = torch.cat((prompt, completion))
        labels = torch.cat((torch.full_like(prompt, IGNORED), completion))
        weights = torch.cat((torch.zeros(len(prompt)), weights))
        if negative_ids is not None:
            before = torch.full((len(prompt), negative_ids.size(1)), -1)
            negative_ids = torch.cat((before, negative_ids))
        return self._cut(Row(ids, ids, labels, weights, negative_ids, hidden, inputs, False))

    def _encoded(
        self, example: Mapping[str, Any], said: str, spans: Sequence[Sequence[int]]
    ) -> Text:
        template = dict(example.get("chat_template_kwargs") or {})
        if example.get("tools") is not None:
            template["tools"] = _filled(example["tools"])
        return self.texts.encode(example["prompt"], example[said], spans, **template)

    def _of_ids(self, example: Mapping[str, Any], found: set[str]) -> Row:
        if not found & {"weights", "negative_ids"} and not self.phrases:
            raise ValueError(
                f"examples: found {_names(found)}, neither weights nor negative_ids; expected {_KINDS}"
            )
        if self.encoder_decoder and "labels" not in found:
            raise ValueError(
                f"examples: found {_names(found)}, expected labels, the decoder's tokens"
            )
        source = _ids("input_ids", example["input_ids"])
        labels = source
        if "labels" in found:
            labels = _ids("labels", example["labels"])
        ids = labels if self.encoder_decoder else source
        weights = torch.ones(len(labels))
        if "weights" in found:
            weights = _reals("weights", example["weights"])
        _check_length("labels", labels, len(ids), "input_ids")
        _check_length("weights", weights, len(labels), "labels")
        negative_ids = _table(example["negative_ids"]) if "negative_ids" in found else None
        if negative_ids is not None:
            _check_length("negative_ids", negative_ids, len(labels), "labels")
        inputs = self._inputs_of(example, found, len(source), len(ids))
        if self.encoder_decoder and bool((ids == IGNORED).any()):
            kept = int((ids != IGNORED).sum())
            if bool((ids[:kept] == IGNORED).any()):
                raise ValueError(
                    "labels: -100 before the last token of an encoder-decoder's example, which hides what its decoder "
                    "is to read; expected the true ids, with weight 0 where nothing is to be learnt"
                )
            ids, labels, weights = ids[:kept], labels[:kept], weights[:kept]
            negative_ids = None if negative_ids is None else negative_ids[:kept]
            inputs = {
                name: x[:kept] if name.startswith("decoder_") else x for name, x in inputs.items()
            }
        hidden = _hidden(example)
        return self._cut(Row(source, ids, labels, weights, negative_ids, hidden, inputs, False))

    def _inputs_of(
        self, example: Mapping[str, Any], found: set[str], source: int | None, length: int | None
    ) -> dict[str, Tensor]:
        """What the model's forward takes beside ids, of an example of ids with those lengths or of a text (None)."""
        inputs: dict[str, Tensor] = {}
        if "cu_seq_lens_q" in found and source is not None:
            ends = _ids("cu_seq_lens_q", example["cu_seq_lens_q"])
            rising = len(ends) > 1 and bool((ends.diff() > 0).all())
            if not rising or ends[0] != 0 or ends[-1] != source:
                raise ValueError(
                    f"cu_seq_lens_q: {ends.tolist()} of {source} tokens, expected numbers that rise from 0 to that"
                )
            inputs["position_ids"] = torch.cat([torch.arange(n) for n in ends.diff().tolist()])
        for name in sorted(found - {*COLUMNS}):
            if not takes(self.taken, name):
                if name == "position_ids" and source is not None:
                    positions = _ids(name, example[name])
                    if bool((positions[1:] == 0).any()):
                        raise ValueError(
                            "position_ids: begin again at 0 within an example, expected one text in each, as the "
                            "model's forward does not take them"
                        )
                continue
            if name in _OTHERS:
                raise ValueError(
                    f"{name}: a column of the examples, expected input_ids in its place"
                )
            inputs[name] = self._input(name, example[name], source, length)
        return inputs

    def _input(self, name: str, values: Any, source: int | None, length: int | None) -> Tensor:
        try:
            x = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{name}: {type(values).__name__}, which the model's forward takes, but which is no tensor; expected "
                "a number for each token, or images"
            ) from None
        if name == "pixel_values" and x.dim() == 3:
            return x[None]
        each_token = name.removeprefix("decoder_") in _OF_TOKENS
        if x.dim() > 1 and not each_token:
            return x
        of, expected = ("labels", length) if name.startswith("decoder_") else ("input_ids", source)
        if expected is None:
            raise ValueError(
                f"{name}: shape {tuple(x.shape)} beside a text, whose tokens are not known before; expected examples "
                "of input_ids"
            )
        if x.shape != (expected,):
            raise ValueError(
                f"{name}: shape {tuple(x.shape)}, expected ({expected},), a number for each of {of}"
            )
        if name.endswith("attention_mask"):
            if bool(((x != 0) & (x != 1)).any()):
                other = x[(x != 0) & (x != 1)][0].item()
                raise ValueError(f"{name}: holds {other}, expected 0 and 1")
            return x.long()
        return _ids(name, x) if each_token else x

    def _cut(self, row: Row) -> Row:
        """The row without the padding that the example has, and not longer than ``max_length``."""
        source, ids, hidden = row.source, row.ids, row.ref_hidden_states
        kept = own = _unpadded(row.inputs.get("attention_mask"), len(source))
        if self.encoder_decoder:
            own = _unpadded(row.inputs.get("decoder_attention_mask"), len(ids))
        for name, place in (("input_ids", kept), ("labels", own)):
            if place.stop == place.start:
                raise ValueError(f"{name}: no tokens that are not padding, expected at least one")
        counted = own
        kept, own = (_at_most(place, self.max_length) for place in (kept, own))
        if hidden is not None and len(hidden) != len(ids):  # of what is left
            _check_length("ref_hidden_states", hidden, own.stop - own.start, "the tokens")
        elif hidden is not None:
            hidden = hidden[own]
        if kept == slice(0, len(source)) and own == slice(0, len(ids)):
            return row
        labels, weights = row.labels[own], row.weights[own]
        return Row(
            source=source[kept],
            ids=ids[own],
            labels=labels,
            weights=weights,
            negative_ids=None if row.negative_ids is None else row.negative_ids[own],
            ref_hidden_states=hidden,
            inputs={
                name: x[own if name.startswith("decoder_") else kept] if x.dim() == 1 else x
                for name, x in row.inputs.items()
            },
            lost=self._counts(row.labels[counted], row.weights[counted])
            and not self._counts(labels, weights),
        )

    def _counts(self, labels: Tensor, weights: Tensor) -> bool:
        """Whether a row of these counts."""
        counts = (labels != IGNORED) & (weights != 0)
        return bool((counts if self.encoder_decoder else counts[1:]).any())


def _at_most(place: slice, length: int | None) -> slice:
    stop = place.stop if length is None else min(place.stop, place.start + length)
    return slice(place.start, stop)


def _unpadded(mask: Tensor | None, length: int) -> slice:
    """The tokens between the first and the last that a mask keeps."""
    if mask is None:
        return slice(0, length)
    there = mask.nonzero()
    return slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)


def _check_one(found: set[str]) -> None:
    if len(found) > 1:
        raise ValueError(f"examples: found {_names(found)}, expected one of them alone")


def _names(found: set[str]) -> str:
    return f"the columns {', '.join(sorted(found))}" if found else "no columns"


def _filled(x: Any) -> Any:
    """Without the keys that are None: Arrow gives every tool of a column the keys of all."""
    if isinstance(x, Mapping):
        return {key: _filled(value) for key, value in x.items() if value is not None}
    return [_filled(value) for value in x] if isinstance(x, (list, tuple)) else x


def _ids(name: str, x: Any) -> Tensor:
    """(T,) int64. The collator looks at the numbers."""
    ids = torch.as_tensor(x)
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"{name}: shape {tuple(ids.shape)}, {ids.dtype}, expected (T,) integers")
    return ids.long()


def _reals(name: str, x: Any) -> Tensor:
    values = torch.as_tensor(x)
    if values.dim() != 1:
        raise ValueError(f"{name}: shape {tuple(values.shape)}, expected (T,)")
    return values.float()


def _table(x: Any) -> Tensor:
    """Lists of ids, of any lengths, as (T, K), padded with -1."""
    rows = [x] if isinstance(x, Tensor) and x.dim() == 2 else [torch.as_tensor(row) for row in x]
    for row in rows:
        if row.numel() and (row.is_floating_point() or row.dtype == torch.bool):
            raise ValueError(f"negative_ids: {row.dtype}, expected integers")
    if not rows:
        return torch.empty(0, 0).long()
    if isinstance(x, Tensor) and x.dim() == 2:
        return x.long()
    return pad_sequence([row.long().view(-1) for row in rows], batch_first=True, padding_value=-1)


def _hidden(example: Mapping[str, Any]) -> Tensor | None:
    if example.get("ref_hidden_states") is None:
        return None
    hidden = torch.as_tensor(example["ref_hidden_states"])
    if hidden.dim() != 2 or not hidden.is_floating_point() or not bool(hidden.isfinite().all()):
        raise ValueError(
            f"ref_hidden_states: shape {tuple(hidden.shape)}, {hidden.dtype}, expected (T, H), finite"
        )
    return hidden


def _check_length(name: str, x: Tensor, length: int, of: str) -> None:
    if len(x) != length:
        raise ValueError(f"{name}: {len(x)} of them, expected {length}, as many as {of}")
