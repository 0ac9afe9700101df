"""Iterative refinement: a model says something, it is annotated, the model is updated, and again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StopStringCriteria

from tnt_kernels.hf.collator import TNTDataCollator
from tnt_kernels.hf.config import TNTConfig
from tnt_kernels.hf.models import base_of, is_peft, virtual_tokens
from tnt_kernels.hf.original import frozen_copy
from tnt_kernels.hf.texts import Texts, ends_of
from tnt_kernels.hf.trainer import TNTTrainer

Example = dict[str, Any]
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

#: What of a model's generation config says nothing of the distribution.
_KEPT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "stop_strings",
    "max_length", "max_new_tokens", "max_time", "cache_implementation", "cache_config", "max_cache_len",
    "compile_config", "disable_compile", "prefill_chunk_size",
}  # fmt: skip


class Round(NamedTuple):
    examples: list[Example]  # this round's, annotated
    log_history: list[dict[str, float]]  # the trainer's


def generate_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 8,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **generation: Any,
) -> list[Example]:
    """What the model says, as examples for :class:`TNTDataCollator`.

    By default the model's own distribution is sampled from: of the model's generation config only the special ids, the
    stop strings and the lengths count, not its temperature, top_p, penalties and the like. Those count where a
    ``generation_config`` is given, which the model's completes as in ``generate``.

    Args:
        model: with ``generate``; PEFT or not.
        tokenizer: of the model.
        prompts: texts, chats (lists of messages) or ids.
        batch_size: prompts in a batch.
        chat_template_kwargs: what the chat template reads beside the messages, as ``tools``.
        generation: keywords of ``generate``, over those of the generation config.

    Returns:
        For each prompt ``num_return_sequences`` examples ``{"prompt": ids, "completion": ids, "text": the completion
        decoded}``, next to each other. The ids end with the end token or the token that completed a stop string where
        the model got there. An encoder-decoder model whose labels wrap round (mBART) gets its decoder's start token
        behind them, and its ``forced_eos_token_id`` counts.

    Raises:
        ValueError: before anything is generated: prompts that are none; ``stopping_criteria``, as they do not tell
            where they ended a completion; an encoder-decoder model whose ``prepare_decoder_input_ids_from_labels``
            cannot give what its decoder reads. And later: it does not give that of a completion, which has pads inside;
            ``generate`` does not return continuations of the prompts.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}, expected at least 1")
    if generation.get("stopping_criteria"):
        raise ValueError(
            "stopping_criteria: where they end a completion cannot be seen in it; expected stop_strings or eos_token_id"
        )
    own = base_of(model).generation_config
    config, others = _config(own, tokenizer, generation)
    encoder_decoder = bool(model.config.is_encoder_decoder)
    decoder = _Decoder.of(model, config) if encoder_decoder else None
    if decoder is not None and decoder.wraps:
        if config.forced_eos_token_id is None:
            config.forced_eos_token_id = own.forced_eos_token_id
        if config.forced_eos_token_id is None or config.stop_strings or config.max_time:
            raise ValueError(
                f"generation: {_name(model)} makes its decoder's inputs of completions that end with an end token; "
                "expected a forced_eos_token_id, neither stop_strings nor max_time"
            )
    ends = ends_of(tokenizer, config)
    texts = Texts(tokenizer, encoder_decoder, ends)
    sources = _ids_of(prompts, texts, chat_template_kwargs or {})
    stop = None
    if config.stop_strings is not None:
        stop = StopStringCriteria(tokenizer, config.stop_strings)
        others = {"tokenizer": tokenizer, **others}
    device = next(model.parameters()).device
    done: list[list[Example]] = [[] for _ in sources]
    with _generating(model, config):
        # Padding would stand between the embeddings that PEFT puts in front and the text.
        for numbers in _batches(sources, batch_size, alike=virtual_tokens(model) > 0):
            part = [sources[number] for number in numbers]
            ids, mask = _padded(part, ends.pad or 0, left=not encoder_decoder)
            said = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), **others
            )
            said = (said if isinstance(said, Tensor) else said.sequences).cpu()
            count = config.num_return_sequences or 1
            read = ids if decoder is None else torch.full((len(part), 1), decoder.start)
            read = read.repeat_interleave(count, dim=0)
            if said.dim() != 2 or not torch.equal(said[:, : read.size(1)], read):
                raise ValueError(
                    f"generation: generate returns {tuple(said.shape)}, not {count} continuation(s) of each of "
                    f"{len(part)} prompts; expected keywords that leave the prompts as they are"
                )
            lengths = _lengths(said, read.size(1), _listed(config.eos_token_id), stop)
            for row, (length, tokens) in enumerate(zip(lengths, said.tolist(), strict=True)):
                completion = tokens[read.size(1) : length]
                if decoder is not None:
                    completion = decoder.labels(completion)
                text = tokenizer.decode(completion, skip_special_tokens=True)
                example = {
                    "prompt": list(part[row // count]),
                    "completion": completion,
                    "text": text,
                }
                done[numbers[row // count]].append(example)
    return [example for examples in done for example in examples]


def _config(
    own: GenerationConfig, tokenizer: Any, options: Mapping[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The generation config that counts, whole, and the keywords of ``generate`` that are none of its."""
    given, options = options.get("generation_config"), dict(options)
    options.pop("generation_config", None)
    defaults = own.to_dict()
    if given is None:
        config = GenerationConfig()
        defaults = {k: x for k, x in defaults.items() if k in _KEPT or not hasattr(config, k)}
        config.do_sample = options.get("do_sample", True)
        config.top_k = 0 if config.do_sample else None  # None: 50
    else:
        config = copy.deepcopy(given)
    config.update(**defaults, defaults_only=True, allow_custom_entries=True)
    others = config.update(**options)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.pad_token_id is None:  # of no consequence, as it is masked and cut off
        config.pad_token_id = next(iter(_listed(config.eos_token_id)), 0)
    return config, others


@contextmanager
def _generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """The model in eval mode, and with ``config`` as its own: ``generate`` fills what is None from the model's."""
    base = base_of(model)
    own, training = base.generation_config, [x for x in model.modules() if x.training]
    base.generation_config = config
    model.eval()
    try:
        yield
    finally:
        base.generation_config = own
        for module in training:
            module.training = True


def _ids_of(
    prompts: Sequence[Prompt], texts: Texts, template: Mapping[str, Any]
) -> list[list[int]]:
    if isinstance(prompts, str) or any(isinstance(x, (int, Mapping)) for x in prompts):
        raise ValueError(
            "prompts: a single prompt, expected a list of texts, chats or lists of ids"
        )
    sources = [texts.prompt_ids(prompt, **template) for prompt in prompts]
    for number, ids in enumerate(sources):
        if not ids:
            raise ValueError(f"prompts: number {number} has no tokens, expected one at least")
    return sources


def _batches(rows: list[list[int]], size: int, alike: bool) -> Iterator[list[int]]:
    """The numbers of the rows of each batch; ``alike``: of one length."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(len(row) if alike else 0, []).append(number)
    for group in groups.values():
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _padded(rows: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask. An encoder's are padded on the right: its positions count from the first id, pad or not."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest).long()
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids, mask


def _lengths(
    said: Tensor, begin: int, ends: list[int], stop: StopStringCriteria | None
) -> list[int]:
    """Where each row ends: behind the first end token or the first token that completes a stop string, as in
    ``generate``; pads behind may be any token."""
    over = torch.isin(said, torch.tensor(ends, dtype=said.dtype))
    if stop is not None:
        for place in range(begin, said.size(1)):
            over[:, place] |= stop(said[:, : place + 1], None)
    over[:, :begin] = False
    over[:, -1] = True
    return (over.int().argmax(dim=1) + 1).tolist()


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _name(model: Any) -> str:
    return type(base_of(model)).__name__


class _Decoder(NamedTuple):
    """How an encoder-decoder model makes of labels what its decoder reads."""

    model: Any
    start: int
    wraps: bool  # the last label, which is the start token, to the front

    @classmethod
    def of(cls, model: Any, config: GenerationConfig) -> _Decoder:
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        name = _name(model)
        if not isinstance(start, int):
            raise ValueError(f"decoder_start_token_id: {start}, expected one id, for {name}")
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise ValueError(f"model: {name}, expected prepare_decoder_input_ids_from_labels in it")
        special = (start, config.pad_token_id, model.config.pad_token_id)
        a, b = [i for i in range(5) if i not in special][:2]
        for wraps in (False, True):
            decoder = cls(model, start, wraps)
            labels = [a, b, start] if wraps else [a, b]
            if decoder.inputs(labels) == [start, *labels[:-1]]:
                break
        else:
            raise ValueError(
                f"decoder_start_token_id: {start} of the generation config, expected the id that "
                f"prepare_decoder_input_ids_from_labels of {name} begins with, {decoder.inputs([a, b])[0]}"
            )
        return decoder

    def inputs(self, labels: list[int]) -> list[int]:
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([labels]))
        return [int(i) for i in shifted[0]]

    def labels(self, completion: list[int]) -> list[int]:
        if self.wraps and completion[-1] != self.start:
            completion = [*completion, self.start]
        if self.inputs(completion) != [self.start, *completion[:-1]]:
            raise ValueError(
                f"completion: prepare_decoder_input_ids_from_labels of {_name(self.model)} does not give what the "
                f"decoder read to say {completion}; expected no pads in it"
            )
        return completion


def refine(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    annotate: Callable[[list[Example]], list[Example]],
    args: TNTConfig,
    *,
    rounds: int = 3,
    reference: str = "first",
    ref_model: nn.Module | None = None,
    data_collator: TNTDataCollator | None = None,
    generation: Mapping[str, Any] | None = None,
) -> list[Round]:
    """Generates, has annotated and updates ``model``, in place, ``rounds`` times.

    An update changes what the model says, and so what there is to annotate. Minimal targeted updates compose
    (arXiv 2406.13660): the update of an update is the update for both sets of unwanted outputs.

    Args:
        model: the model; PEFT or not.
        tokenizer: of the model.
        prompts: texts, chats (lists of messages) or ids to generate from, in every round.
        annotate: gets what :func:`generate_completions` returns, and returns the examples to train on, most likely the
            same with ``negative_spans`` (characters of "text") or ``weights`` (one for each id of "completion").
        args: of the trainer; ``output_dir`` gets a folder for each round.
        rounds: how many.
        reference: "first": the reference stays the first model, and every round trains on all examples so far, as
            it has to keep up what earlier rounds removed. "previous": the reference of a round is the model that it
            starts from, and it trains on its own examples.
        ref_model: the first model, if it is not ``model`` as given; that of a model with adapters is what
            ``args.adapter_reference`` says. Only for "first".
        data_collator: with the options wanted. None: ``TNTDataCollator(tokenizer, model)``.
        generation: keywords of ``generate``.

    Returns:
        The rounds.

    Raises:
        ValueError: an unknown ``reference``; "previous" and a ``ref_model``.
    """
    if reference not in ("first", "previous"):
        raise ValueError(f"reference is {reference!r}, expected 'first' or 'previous'")
    if reference == "previous" and ref_model is not None:
        raise ValueError("reference is 'previous', expected 'first' with a ref_model")
    based = is_peft(model) and args.adapter_reference == "base"
    if reference == "first" and ref_model is None and not based:
        ref_model = frozen_copy(model)
    collator = TNTDataCollator(tokenizer, model) if data_collator is None else data_collator
    done: list[Round] = []
    for number in range(1, rounds + 1):
        said = generate_completions(
            model,
            tokenizer,
            prompts,
            batch_size=args.per_device_eval_batch_size,
            **(generation or {}),
        )
        examples = annotate(said)
        pool = (
            [example for past in done for example in past.examples] if reference == "first" else []
        )
        own = copy.copy(args)
        own.output_dir = str(Path(args.output_dir, f"round-{number}"))
        own.adapter_reference = "start" if reference == "previous" else args.adapter_reference
        trainer = TNTTrainer(
            model, own, collator, pool + examples, processing_class=tokenizer, ref_model=ref_model
        )
        trainer._expects_trained_adapters = number > 1
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        done.append(Round(examples, trainer.state.log_history))
    return done
