"""Batches of annotated texts: tokens, labels, weights and negative ids, padded or in one row."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin
from transformers.utils import logging

from tnt_kernels.annotate import NegativePhrases
from tnt_kernels.hf.examples import Reader, Row, takes
from tnt_kernels.hf.models import base_of, is_encoder_decoder, learns_prompts
from tnt_kernels.hf.rows import IGNORED
from tnt_kernels.hf.texts import Texts, ends_of

logger = logging.get_logger(__name__)

_OF_VOCABULARY = ("input_ids", "decoder_input_ids", "labels", "negative_ids")
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
      the chat template makes the text; ``tools`` (without keys that are None, which a table adds) and
      ``chat_template_kwargs`` go to it. A plain text gets the special tokens that the tokenizer adds, and an EOS at its
      end.
    - ``prompt``, ``negative`` (or ``completion``) and ``corrected``: what the model said, and what it should have said.

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
    _texts: Texts = field(init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, ProcessorMixin):  # of texts and images
            template, self.tokenizer = self.tokenizer.chat_template, self.tokenizer.tokenizer
            if template is not None and self.tokenizer.chat_template is None:
                self.tokenizer = copy.copy(self.tokenizer)
                self.tokenizer.chat_template = template
        for name in ("max_length", "pad_to_multiple_of"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}: {number}, expected at least 1")
        self._learn(self.model)

    def learn(self, model: Any, vocab_size: int | None) -> None:
        """Takes from ``model`` what has not been said yet: what its forward takes, its ends, its vocabulary."""
        if self.vocab_size is None:
            self.vocab_size = vocab_size
        if self._taken is None:
            self._learn(model)

    def _learn(self, model: Any) -> None:
        self.encoder_decoder = is_encoder_decoder(model)
        if self.encoder_decoder and self.padding_free:
            raise ValueError("padding_free: True for an encoder-decoder model, expected False")
        self.model = model if self.encoder_decoder else None  # a worker need not have it otherwise
        if model is not None:
            self._taken = _taken_by(model)
        ends = ends_of(self.tokenizer, getattr(model, "generation_config", None))
        self._texts = Texts(self.tokenizer, self.encoder_decoder, ends)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not len(examples):
            raise ValueError("examples: none, expected at least one")
        rows = self._rows(examples)
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
        rows = self._rows(examples)
        return self._batch(rows, False, "right"), [len(row.ids) for row in rows]

    def _rows(self, examples: Sequence[Mapping[str, Any]]) -> list[Row]:
        read = self._reader()
        return [read(example) for example in examples]

    def _reader(self) -> Reader:
        return Reader(
            self._texts,
            self._taken,
            self.encoder_decoder,
            self.max_length,
            self.spans,
            self.correction,
            self.phrases is not None,
        )

    # --- A batch ----------------------------------------------------------------------------------

    def _batch(self, rows: list[Row], flat: bool, side: str) -> dict[str, Tensor]:
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
        labels = join([row.labels for row in rows], IGNORED)
        weights = join([row.weights for row in rows], 0.0)
        if not self.encoder_decoder:  # nothing predicts the first token of a text
            lengths = [len(row.ids) for row in rows]
            begins = [0] * len(rows)
            if flat:
                begins = list(accumulate(lengths, initial=0))[:-1]
            elif side == "left":
                begins = [labels.size(1) - length for length in lengths]
            places = [
                (0 if flat else n, begin + start)
                for n, begin in enumerate(begins)
                for start in starts[n]
            ]
            labels[tuple(torch.tensor(places).unbind(1))] = IGNORED
        labels.masked_fill_(weights == 0, IGNORED)
        weights.masked_fill_(labels == IGNORED, 0.0)
        batch = {"input_ids": join([row.source for row in rows], pad)}
        batch |= self._inputs(rows, starts, join, flat, side)
        if self.encoder_decoder and "decoder_input_ids" not in batch:
            shift = self.model.prepare_decoder_input_ids_from_labels
            # One by one, as some models look for the last token that is no padding.
            shifted = [shift(labels=row.ids[None])[0] for row in rows]
            batch["decoder_input_ids"] = join(shifted, pad)
        batch |= {"labels": labels, "weights": weights}
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
        self._check_numbers(batch)
        return batch

    def _inputs(
        self, rows: list[Row], starts: list[list[int]], join: _Join, flat: bool, side: str
    ) -> dict[str, Tensor]:
        """What the model reads beside ids: the mask, positions, and whatever else its forward takes."""
        found: dict[str, Tensor] = {}
        masks = [row.inputs.get("attention_mask", torch.ones_like(row.source)) for row in rows]
        packed = flat or any(len(places) > 1 for places in starts)
        positioned = [row.inputs["position_ids"] for row in rows if "position_ids" in row.inputs]
        if packed:
            if not all(bool(mask.all()) for mask in masks):
                raise ValueError(
                    "attention_mask: holds 0 between tokens of a row with several texts, expected 1, as transformers "
                    "finds the texts by their positions where there is no mask"
                )
            if self.encoder_decoder or not takes(self._taken, "position_ids"):
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
            _check_shapes(name, values)
            found[name] = torch.cat(values)
        return found

    def _negative_ids(self, rows: list[Row], starts: list[list[int]], join: _Join) -> Tensor | None:
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
                for row, places in zip(rows, starts, strict=True)
                for text in row.ids.tensor_split(places[1:])
            ]
            table = self.phrases.at(pad_sequence(texts, batch_first=True, padding_value=-1))
            pieces = [ids[: len(text)] for ids, text in zip(table, texts, strict=True)]
            every = torch.cat(pieces).split([len(row.ids) for row in rows])
            parts.append(join(every, -1))
        return torch.cat(parts, dim=2) if parts else None

    def _check_numbers(self, batch: dict[str, Tensor]) -> None:
        """Of the whole batch at once, as many small checks would cost more than all else."""
        weights = batch["weights"]
        if not bool(weights.isfinite().all()):
            wrong = weights[~weights.isfinite()][0].item()
            raise ValueError(f"weights: holds {wrong}, expected finite numbers")
        also = {
            "labels": f", or {IGNORED} where nothing is to be learnt",
            "negative_ids": ", or -1 for none",
        }
        for name in (*_OF_VOCABULARY, "position_ids"):
            x = batch.get(name)
            x = x[x != IGNORED] if x is not None and name == "labels" else x
            if x is None or not x.numel():
                continue
            least, most = (int(i) for i in x.aminmax())
            if least < (-1 if name == "negative_ids" else 0):
                raise ValueError(
                    f"{name}: holds {least}, expected numbers from 0 on{also.get(name, '')}"
                )
            if self.vocab_size is not None and most >= self.vocab_size and name in _OF_VOCABULARY:
                raise ValueError(
                    f"{name}: holds the id {most}, expected ids below {self.vocab_size}, the size of the vocabulary "
                    "that the model and its reference share"
                )

    def _warn_of_lost_rows(self, rows: list[Row]) -> None:
        lost = sum(row.lost for row in rows)
        if lost and not self._warned:
            self._warned = True
            logger.warning(
                f"max_length: {self.max_length} leaves nothing to learn of {lost} of the {len(rows)} examples of a "
                "batch, as their prompts fill it; they do not count (active_rows in the logs says how many rows do). "
                "This is said once."
            )


def _taken_by(model: Any) -> frozenset[str]:
    """The names that the forward of a model takes, adapters or not."""
    names = {*inspect.signature(base_of(model).forward).parameters}
    if learns_prompts(model):
        # PEFT ignores them for virtual tokens, and padding must not stand between a prefix and the text.
        names -= {"position_ids", "token_type_ids"}
    return frozenset(names - {"labels", "input_ids"})


def _starts(row: Row) -> list[int]:
    """Where the texts of a row begin."""
    positions = row.inputs.get("position_ids")
    if positions is None or len(positions) != len(row.ids):
        return [0]
    return sorted({0, *(positions == 0).nonzero().view(-1).tolist()})


def _widened(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.size(1)), value=-1)


def _check_all(name: str, values: Sequence[Tensor], rows: Sequence[Row]) -> None:
    if len(values) < len(rows):
        raise ValueError(
            f"{name}: in {len(values)} of {len(rows)} examples, expected in all or in none"
        )
    _check_shapes(name, values)


def _check_shapes(name: str, values: Sequence[Tensor]) -> None:
    if len({(x.dim(), x.shape[1:]) for x in values}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in values)
        raise ValueError(f"{name}: shapes {shapes}, expected the same but for the first dimension")
