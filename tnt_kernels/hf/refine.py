"""Iterative refinement: a model says something, it is annotated, the model is updated, and again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tnt_kernels.hf import reference as originals
from tnt_kernels.hf.collator import TNTDataCollator
from tnt_kernels.hf.config import TNTConfig
from tnt_kernels.hf.trainer import TNTTrainer

Example = dict[str, Any]


class Round(NamedTuple):
    examples: list[Example]  # this round's, annotated
    log_history: list[dict[str, float]]  # the trainer's


def generate_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    batch_size: int = 8,
    **generation: Any,
) -> list[Example]:
    """What the model says, as examples for :class:`TNTDataCollator`.

    Args:
        model: with ``generate``.
        tokenizer: of the model.
        prompts: texts or ids.
        batch_size: prompts in a batch.
        generation: keywords of ``generate``. Without any, the model's own distribution is sampled from.

    Returns:
        For each prompt ``{"prompt": ids, "completion": ids, "text": the completion decoded}``; the ids end with EOS
        where the model did.
    """
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **generation}
    encoder_decoder = bool(model.config.is_encoder_decoder)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    pad = eos if pad is None else pad
    device, training = next(model.parameters()).device, model.training
    done: list[Example] = []
    model.eval()
    try:
        for begin in range(0, len(prompts), batch_size):
            part = [
                tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
                for prompt in prompts[begin : begin + batch_size]
            ]
            longest = max(map(len, part))
            ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in part])
            mask = torch.tensor(
                [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part]
            )
            said = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                pad_token_id=pad,
                use_cache=True,
                **options,
            )
            said = said[:, 1 if encoder_decoder else longest :].tolist()
            for prompt, completion in zip(part, said, strict=True):
                if eos in completion:
                    completion = completion[: completion.index(eos) + 1]
                text = tokenizer.decode(completion, skip_special_tokens=True)
                done.append({"prompt": prompt, "completion": completion, "text": text})
    finally:
        model.train(training)
    return done


def refine(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
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
        prompts: texts or ids to generate from, in every round.
        annotate: gets what :func:`generate_completions` returns, and returns the examples to train on, most likely the
            same with ``negative_spans`` (characters of "text") or ``weights`` (one for each id of "completion").
        args: of the trainer; ``output_dir`` gets a folder for each round.
        rounds: how many.
        reference: "first": the reference stays the first model, and every round trains on all examples so far, as
            it has to keep up what earlier rounds removed. "previous": the reference of a round is the model that it
            starts from, and it trains on its own examples.
        ref_model: the first model, if it is not ``model`` as given. Only for "first".
        data_collator: with the options wanted. None: ``TNTDataCollator(tokenizer, model)``.
        generation: keywords of ``generate``.

    Returns:
        The rounds.

    Raises:
        ValueError: an unknown ``reference``; "previous" for a PEFT model, whose only reference is its base.
    """
    if reference not in ("first", "previous"):
        raise ValueError(f"reference is {reference!r}, expected 'first' or 'previous'")
    if reference == "previous" and (ref_model is not None or originals.is_peft(model)):
        raise ValueError(
            "reference is 'previous', expected 'first' with a ref_model or a PEFT model; or merge the adapters first"
        )
    if reference == "first" and ref_model is None and not originals.is_peft(model):
        ref_model = originals.frozen_copy(model)
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
        trainer = TNTTrainer(
            model, own, collator, pool + examples, processing_class=tokenizer, ref_model=ref_model
        )
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        done.append(Round(examples, trainer.state.log_history))
    return done
