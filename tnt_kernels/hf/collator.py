"""Batches of annotated texts: tokens, labels, weights and negative ids, padded or in one row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin
from transformers.utils import logging

from tnt_kernels.annotate import NegativePhrases, weights_from_correction, weights_from_spans
from tnt_kernels.hf import reference as originals
from tnt_kernels.hf.rows import IGNORED
from tnt_kernels.hf.texts import Text, Texts, ends_of

logger = logging.get_logger(__name__)

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
#: What forwards take and no example can have.
_OTHERS = (
    "inputs_embeds", "decoder_inputs_embeds", "past_key_values", "encoder_outputs", "cache_position",
    "logits_to_keep",
)  # fmt: skip


class _Row(NamedTuple):
    """One example. All but ``source`` and what goes with it is in line with ``ids``."""

    source: Tensor  # what the model reads: the encoder's ids, or ``ids``
    ids: Tensor  # the tokens that labels speak of: the decoder's, or those of a causal model
    labels: Tensor
    weights: Tensor
    negative_ids: Tensor | None  # (T, K)
    ref_hidden_states: Tensor | None  # (T, H)
    inputs: dict[str, Tensor]  # what else the model's forward takes
    lost: bool  # ``max_length`` has cut off all rows that count


#: Puts tensors of examples together: (tensors (T, ...), value of padding) to (B, T, ...).
_Join = Callable[[Sequence[Tensor], float], Tensor]


@dataclass
class TNTDataCollator:
    """Makes batches of examples of one of these kinds:

    - ``input_ids``, ``labels``, and ``weights`` or ``negative_ids`` (or both), in line with each other; for an
      encoder-decoder model, labels, weights and negative ids speak of the decoder's tokens. Causal models can do
      without ``labels``. Prompts have weight 0.
    - ``prompt``, ``completion`` and ``negative_spans``: texts, and the ``(begin, end)`` characters of the completion
      that are unwanted. With a list of messages as ``prompt`` (or ``messages``, the last of which is the completion),
      the chat template makes the text; ``tools`` and ``chat_template_kwargs`` go to it. A plain text gets the special
      tokens that the tokenizer adds, and an EOS at its end.
    - ``prompt``, ``negative`` and ``corrected``: what the model said, and what it should have said.

    A prompt or completion can also be a list of ids, as generated: it is never tokenised again, gets no EOS, and takes
    ``negative_spans`` of the decoded text or ``weights`` for each of its ids. ``ref_hidden_states`` (T, H) may come
    with any kind. Tokens behind the end of a completion have weight 0.

    What else the model's forward takes and examples have is passed on: a column with a number for each token
    (``attention_mask``, ``position_ids``, ``token_type_ids``; for the decoder's tokens ``decoder_...``) is padded,
    ``pixel_values`` (C, H, W) are stacked, and what has two dimensions or more is joined along the first, as processors
    lay out images. Padding that examples have already, which their ``attention_mask`` says, is taken off. An example
    whose ``position_ids`` begin again at 0 (or with ``cu_seq_lens_q``) holds several texts; such batches have no
    ``attention_mask``, so that transformers finds the texts by their positions.

    A batch is padded on the tokenizer's ``padding_side``: on the left for causal models that take ``position_ids``,
    which are added then. ``labels``, ``weights`` and ``negative_ids`` are in line with the tokens, the convention of
    transformers: :class:`TNTTrainer` shifts them. Labels are -100 wherever nothing is to be learnt, so that other
    trainers count the same rows.

    Args:
        tokenizer: needed for texts.
        model: needed for encoder-decoder models, which shift the labels into ``decoder_input_ids``. It also says what
            its forward takes, and which tokens end what it says; :class:`TNTTrainer` fills that in.
        max_length: longer sequences lose their end; spans are clipped to what is left. A warning says so once where
            nothing is left that counts.
        spans: "all" or "first", as in :func:`tnt.weights_from_spans`.
        correction: "first", "diff" or "full", as in :func:`tnt.weights_from_correction`.
        phrases: gives every position all tokens that would complete an unwanted phrase, as further ``negative_ids``.
        pad_to_multiple_of: of the length.
        vocab_size: ids must be below. None: not checked (the trainer fills it in).
        padding_free: all texts of a batch in one row (1, T), with ``position_ids`` and no ``attention_mask``, for
            causal models. :class:`TNTTrainer` evaluates with padding all the same.

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
    padding_free: bool = False
    _taken: frozenset[str] | None = field(default=None, init=False, repr=False)  # by the forward
    _texts: Texts | None = field(default=None, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        model = self.model
        if isinstance(self.tokenizer, ProcessorMixin):  # of texts and images
            self.tokenizer = self.tokenizer.tokenizer
        config = getattr(model, "config", None)
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        if self.encoder_decoder and self.padding_free:
            raise ValueError("padding_free: True for an encoder-decoder model, expected False")
        if not self.encoder_decoder:
            self.model = None  # a worker of the data loader need not have it
        if self.tokenizer is not None:
            ends = ends_of(self.tokenizer, getattr(model, "generation_config", None))
            self._texts = Texts(self.tokenizer, self.encoder_decoder, ends)
        if model is not None:
            self._taken = _taken_by(model)

    def learn(self, model: Any, vocab_size: int | None) -> None:
        """Takes from ``model`` what has not been said yet: what its forward takes, its ends, its vocabulary."""
        if self.vocab_size is None:
            self.vocab_size = vocab_size
        if self._taken is None:
            self._taken = _taken_by(model)
            if self._texts is not None:
                ends = ends_of(self.tokenizer, getattr(model, "generation_config", None))
                self._texts = Texts(self.tokenizer, self.encoder_decoder, ends)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [self._row(example) for example in examples]
        self._warn_of_lost_rows(rows)
        taken = self._taken or frozenset()
        left = (
            getattr(self.tokenizer, "padding_side", "right") == "left"
            and not self.encoder_decoder
            and "position_ids" in taken
            and not taken
            & {"image_grid_thw", "video_grid_thw"}  # whose positions have three coordinates
        )
        return self._batch(rows, self.padding_free, "left" if left else "right")

    def padded(self, examples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[int]]:
        """The batch, padded on the right whatever the options say, and the lengths of the examples."""
        rows = [self._row(example) for example in examples]
        return self._batch(rows, False, "right"), [len(row.ids) for row in rows]

    # --- A batch ----------------------------------------------------------------------------------

    def _batch(self, rows: list[_Row], flat: bool, side: str) -> dict[str, Tensor]:
        def join(tensors: Sequence[Tensor], value: float) -> Tensor:
            if flat:
                joined = torch.cat(list(tensors))[None]
            else:
                joined = pad_sequence(
                    list(tensors), batch_first=True, padding_value=value, padding_side=side
                )
            missing = -joined.size(1) % (self.pad_to_multiple_of or 1)
            if missing:
                fill = joined.new_full((joined.size(0), missing, *joined.shape[2:]), value)
                parts = (fill, joined) if side == "left" and not flat else (joined, fill)
                joined = torch.cat(parts, dim=1)
            return joined

        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        starts = [_starts(row) for row in rows]
        labels = [row.labels.clone() for row in rows]
        weights = [row.weights.clone() for row in rows]
        for row_labels, row_weights, row_starts in zip(labels, weights, starts, strict=True):
            if not self.encoder_decoder:
                row_labels[row_starts] = IGNORED  # nothing predicts the first token of a text
            row_labels[row_weights == 0] = IGNORED
            row_weights[row_labels == IGNORED] = 0.0
        batch = {"input_ids": join([row.source for row in rows], pad)}
        batch |= self._inputs(rows, starts, join, flat, side)
        if self.encoder_decoder and "decoder_input_ids" not in batch:
            shift = self.model.prepare_decoder_input_ids_from_labels
            # One by one, as some models look for the last token that is no padding.
            shifted = [shift(labels=row.ids[None])[0] if len(row.ids) else row.ids for row in rows]
            batch["decoder_input_ids"] = join(shifted, pad)
        batch |= {"labels": join(labels, IGNORED), "weights": join(weights, 0.0)}
        negative_ids = self._negative_ids(rows, starts, join)
        if negative_ids is not None:
            negative_ids[batch["labels"] == IGNORED] = -1
            # No column without an id, but at least one: a batch without negatives is no batch without annotations.
            count = (negative_ids >= 0).sum(dim=2)
            widest = max(1, int(count.max())) if negative_ids.numel() else 0
            ordered = negative_ids.sort(dim=2, descending=True).values
            batch["negative_ids"] = ordered[:, :, :widest].contiguous()
        hidden = [row.ref_hidden_states for row in rows if row.ref_hidden_states is not None]
        if hidden:
            _check_all("ref_hidden_states", hidden, rows)
            batch["ref_hidden_states"] = join(hidden, 0.0)
        self._check_ids(batch)
        return batch

    def _inputs(
        self, rows: list[_Row], starts: list[Tensor], join: _Join, flat: bool, side: str
    ) -> dict[str, Tensor]:
        """What the model reads beside ids: the mask, positions, and whatever else its forward takes."""
        found: dict[str, Tensor] = {}
        masks = [row.inputs.get("attention_mask", torch.ones_like(row.source)) for row in rows]
        packed = flat or any(int(x.sum()) > 1 for x in starts)
        positioned = [row.inputs["position_ids"] for row in rows if "position_ids" in row.inputs]
        if packed:
            if not all(bool(mask.all()) for mask in masks):
                raise ValueError(
                    "attention_mask: holds 0 between tokens of a row with several texts, expected 1, as transformers "
                    "finds the texts by their positions where there is no mask"
                )
            if self.encoder_decoder or not self._takes("position_ids"):
                raise ValueError(
                    "position_ids: needed for several texts in a row, expected a causal model whose forward takes them"
                )
        else:
            found["attention_mask"] = join(masks, 0)
        if packed or positioned or side == "left":
            ranks = [(mask.cumsum(0) - 1).clamp(min=0) for mask in masks]
            positions = [
                row.inputs.get("position_ids", rank) for row, rank in zip(rows, ranks, strict=True)
            ]
            found["position_ids"] = join(positions, 0)  # each padding token is a text of its own
        names = dict.fromkeys(name for row in rows for name in row.inputs)
        for name in names:
            if name in ("attention_mask", "position_ids"):
                continue
            values = [row.inputs[name] for row in rows if name in row.inputs]
            if values[0].dim() == 1:
                _check_all(name, values, rows)
                found[name] = join(values, 0)
                continue
            if len({(x.dim(), *x.shape[1:]) for x in values}) > 1:
                raise ValueError(
                    f"{name}: shapes {', '.join(str(tuple(x.shape)) for x in values)}, expected the same but for the "
                    "first dimension, along which the examples of a batch are joined"
                )
            found[name] = torch.cat(values)
        return found

    def _negative_ids(self, rows: list[_Row], starts: list[Tensor], join: _Join) -> Tensor | None:
        """(B, T, K): those that examples hold, and those that complete a phrase."""
        parts = []
        given = [row.negative_ids for row in rows]
        if any(x is not None for x in given):
            widest = max(x.size(1) for x in given if x is not None)
            full = [
                torch.full((len(row.ids), widest), -1) if x is None else _widened(x, widest)
                for row, x in zip(rows, given, strict=True)
            ]
            parts.append(join(full, -1))
        if self.phrases is not None:
            texts = [
                text
                for row, start in zip(rows, starts, strict=True)
                for text in row.ids.tensor_split(start.nonzero()[1:, 0])
            ]
            table = self.phrases.at(pad_sequence(texts, batch_first=True, padding_value=-1))
            pieces = [ids[: len(text)] for ids, text in zip(table, texts, strict=True)]
            every = torch.cat(pieces).split([len(row.ids) for row in rows])
            parts.append(join(every, -1))
        return torch.cat(parts, dim=2) if parts else None

    def _check_ids(self, batch: dict[str, Tensor]) -> None:
        if self.vocab_size is None:
            return
        for name in ("input_ids", "decoder_input_ids", "labels", "negative_ids"):
            if name in batch and batch[name].numel() and int(batch[name].max()) >= self.vocab_size:
                raise ValueError(
                    f"{name}: holds the id {int(batch[name].max())}, expected ids below {self.vocab_size}, the size "
                    "of the vocabulary that the model and its reference share"
                )

    def _warn_of_lost_rows(self, rows: list[_Row]) -> None:
        lost = sum(row.lost for row in rows)
        if lost and not self._warned:
            self._warned = True
            logger.warning(
                f"max_length: {self.max_length} leaves nothing to learn of {lost} of the {len(rows)} examples of a "
                "batch, as their prompts fill it; they do not count (active_rows in the logs says how many rows do). "
                "This is said once."
            )

    def _takes(self, name: str) -> bool:
        return name in (_USUAL if self._taken is None else self._taken)

    # --- One example ------------------------------------------------------------------------------

    def _row(self, example: Mapping[str, Any]) -> _Row:
        found = {name for name, value in example.items() if value is not None}
        if "input_ids" in found:
            return self._of_ids(example, found)
        if "messages" in found and len(example["messages"]):
            messages = list(example["messages"])
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
        spans = () if said == "negative" or "weights" in found else example.get("negative_spans")
        text = self._encoded(example, said, spans or ())
        completion, prompt = _ids("completion", text.completion), _ids("prompt", text.prompt)
        if said == "negative":
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
        weights = weights * text.said
        negative_ids = None
        if "negative_ids" in found:
            negative_ids = _table(example["negative_ids"])
            _check_length("negative_ids", negative_ids, len(completion), "the completion's ids")
        inputs = self._inputs_of(example, found, None, None)
        if self.encoder_decoder:
            return self._cut(prompt, completion, completion, weights, negative_ids, example, inputs)
        ids = torch.cat((prompt, completion))
        labels = torch.cat((torch.full_like(prompt, IGNORED), completion))
        weights = torch.cat((torch.zeros(len(prompt)), weights))
        if negative_ids is not None:
            before = torch.full((len(prompt), negative_ids.size(1)), -1)
            negative_ids = torch.cat((before, negative_ids))
        return self._cut(ids, ids, labels, weights, negative_ids, example, inputs)

    def _encoded(
        self, example: Mapping[str, Any], said: str, spans: Sequence[Sequence[int]]
    ) -> Text:
        if self._texts is None:
            raise ValueError("tokenizer: None, expected a tokenizer, because examples have prompts")
        template = dict(example.get("chat_template_kwargs") or {})
        if example.get("tools") is not None:
            template["tools"] = example["tools"]
        return self._texts.encode(example["prompt"], example[said], spans, **template)

    def _of_ids(self, example: Mapping[str, Any], found: set[str]) -> _Row:
        if not found & {"weights", "negative_ids"} and self.phrases is None:
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
            labels = _ids("labels", example["labels"], ignored=True)
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
        if self.encoder_decoder and bool((ids < 0).any()):
            kept = int((ids >= 0).sum())
            if bool((ids[:kept] < 0).any()):
                raise ValueError(
                    "labels: -100 before the last token of an encoder-decoder's example, which hides what its decoder "
                    "is to read; expected the true ids, with weight 0 where nothing is to be learnt"
                )
            ids, labels, weights = ids[:kept], labels[:kept], weights[:kept]
            negative_ids = None if negative_ids is None else negative_ids[:kept]
            inputs = {
                name: x[:kept] if name.startswith("decoder_") else x for name, x in inputs.items()
            }
        return self._cut(source, ids, labels, weights, negative_ids, example, inputs)

    def _inputs_of(
        self, example: Mapping[str, Any], found: set[str], source: int | None, length: int | None
    ) -> dict[str, Tensor]:
        """What the model's forward takes beside ids, of an example of ids with those lengths or of a text (None)."""
        inputs: dict[str, Tensor] = {}
        if "cu_seq_lens_q" in found and source is not None:
            ends = _ids("cu_seq_lens_q", example["cu_seq_lens_q"])
            if (
                len(ends) < 2
                or ends[0] != 0
                or ends[-1] != source
                or bool((ends.diff() <= 0).any())
            ):
                raise ValueError(
                    f"cu_seq_lens_q: {ends.tolist()} of {source} tokens, expected numbers that rise from 0 to that"
                )
            inputs["position_ids"] = torch.cat([torch.arange(n) for n in ends.diff().tolist()])
        for name in sorted(found - {*COLUMNS}):
            if not self._takes(name):
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
        tokens = name.endswith(("attention_mask", "position_ids", "token_type_ids", "input_ids"))
        if x.dim() > 1 and not tokens:
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
        return _ids(name, x) if tokens else x

    def _cut(
        self,
        source: Tensor,
        ids: Tensor,
        labels: Tensor,
        weights: Tensor,
        negative_ids: Tensor | None,
        example: Mapping[str, Any],
        inputs: dict[str, Tensor],
    ) -> _Row:
        """The row, without the padding that the example has, and not longer than ``max_length``."""
        hidden = _hidden(example)
        kept = _unpadded(inputs.get("attention_mask"), len(source))
        own = (
            _unpadded(inputs.get("decoder_attention_mask"), len(ids))
            if self.encoder_decoder
            else kept
        )
        if hidden is not None and len(hidden) == len(ids):
            hidden = hidden[own]
        elif hidden is not None:
            _check_length(
                "ref_hidden_states", hidden, len(ids[own][: self.max_length]), "the tokens"
            )
        tokens, own_tokens = len(source), len(ids)

        def clipped(x: Tensor, where: slice) -> Tensor:
            return x[where][: self.max_length]

        before = _counts(labels[own], weights[own], self.encoder_decoder)
        inputs = {
            name: clipped(x, own if name.startswith("decoder_") else kept)
            if x.dim() == 1 and len(x) == (own_tokens if name.startswith("decoder_") else tokens)
            else x
            for name, x in inputs.items()
        }
        labels, weights = clipped(labels, own), clipped(weights, own)
        return _Row(
            source=clipped(source, kept),
            ids=clipped(ids, own),
            labels=labels,
            weights=weights,
            negative_ids=None if negative_ids is None else clipped(negative_ids, own),
            ref_hidden_states=None if hidden is None else hidden[: self.max_length],
            inputs=inputs,
            lost=before and not _counts(labels, weights, self.encoder_decoder),
        )


def _taken_by(model: Any) -> frozenset[str]:
    """The names that the forward of a model takes, adapters or not."""
    names = {*inspect.signature(originals.base_of(model).forward).parameters}
    if originals.learns_prompts(model):
        # PEFT ignores them for virtual tokens, and padding must not stand between a prefix and the text.
        names -= {"position_ids", "token_type_ids"}
    return frozenset(names - {"labels", "input_ids"})


def _starts(row: _Row) -> Tensor:
    """(T,) bool: the first tokens of the texts in a row."""
    starts = torch.zeros(len(row.ids), dtype=torch.bool)
    starts[:1] = True
    if "position_ids" in row.inputs and len(row.inputs["position_ids"]) == len(starts):
        starts |= row.inputs["position_ids"] == 0
    return starts


def _unpadded(mask: Tensor | None, length: int) -> slice:
    """The tokens between the first and the last that a mask keeps."""
    if mask is None:
        return slice(0, length)
    there = mask.nonzero()
    return slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)


def _counts(labels: Tensor, weights: Tensor, encoder_decoder: bool) -> bool:
    """Whether a row of these counts."""
    counts = (labels != IGNORED) & (weights != 0)
    return bool((counts if encoder_decoder else counts[1:]).any())


def _names(found: set[str]) -> str:
    return f"the columns {', '.join(sorted(found))}" if found else "no columns"


def _ids(name: str, x: Any, ignored: bool = False) -> Tensor:
    """(T,) int64 of ids, none of them negative; but -100 where ``ignored``."""
    ids = torch.as_tensor(x)
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"{name}: shape {tuple(ids.shape)}, {ids.dtype}, expected (T,) integers")
    ids = ids.long()
    wrong = (ids < 0) & (ids != IGNORED) if ignored else ids < 0
    if bool(wrong.any()):
        also = f", or {IGNORED} where nothing is to be learnt" if ignored else ""
        raise ValueError(f"{name}: holds {int(ids[wrong][0])}, expected ids from 0 on{also}")
    return ids


def _reals(name: str, x: Any) -> Tensor:
    values = torch.as_tensor(x)
    if values.dim() != 1:
        raise ValueError(f"{name}: shape {tuple(values.shape)}, expected (T,)")
    values = values.float()
    if not bool(values.isfinite().all()):
        wrong = values[~values.isfinite()][0].item()
        raise ValueError(f"{name}: holds {wrong}, expected finite numbers")
    return values


def _table(x: Any) -> Tensor:
    """Lists of ids, of any lengths, as (T, K), padded with -1."""
    rows = [x] if isinstance(x, Tensor) and x.dim() == 2 else [torch.as_tensor(row) for row in x]
    for row in rows:
        if row.numel() and (row.is_floating_point() or row.dtype == torch.bool):
            raise ValueError(f"negative_ids: {row.dtype}, expected integers")
    if isinstance(x, Tensor) and x.dim() == 2:
        table = x.long()
    elif rows:
        table = pad_sequence(
            [row.long().view(-1) for row in rows], batch_first=True, padding_value=-1
        )
    else:
        table = torch.empty(0, 0).long()
    if table.numel() and int(table.min()) < -1:
        raise ValueError(
            f"negative_ids: holds {int(table.min())}, expected ids from 0 on, or -1 for none"
        )
    return table


def _widened(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.size(1)), value=-1)


def _hidden(example: Mapping[str, Any]) -> Tensor | None:
    hidden = example.get("ref_hidden_states")
    return None if hidden is None else torch.as_tensor(hidden)


def _check_length(name: str, x: Tensor, length: int, of: str) -> None:
    if len(x) != length:
        raise ValueError(f"{name}: {len(x)} of them, expected {length}, as many as {of}")


def _check_all(name: str, values: Sequence[Tensor], rows: Sequence[_Row]) -> None:
    if len(values) < len(rows):
        raise ValueError(
            f"{name}: in {len(values)} of {len(rows)} examples, expected in all or in none"
        )
