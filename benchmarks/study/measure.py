"""What a model does on held-out prompts, next to the original and to its exact update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sacrebleu
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import tnt_kernels as tnt
from benchmarks.study.task import Scale, Task, Texts
from tnt_kernels.demo import kl_parts


@dataclass(frozen=True)
class Yardstick:
    """The original on one split of prompts.

    Attributes:
        prompts: (B, P).
        greedy: (B, L), its greedy completions.
        unwanted: (B,), which of them have something unwanted.
        words: the same as text.
        disfluencies: (B, 2), see ``Task``.
        prefixes: samples of it with ``ref_logits``: the prefixes at which the distance to the exact update is taken.
        clean: samples of it with nothing unwanted, with their log-probability (B,); None without ``sequence_truth``.
        log_clean: the mean over prompts of the logarithm of the share of its samples that are clean.
    """

    prompts: Tensor
    greedy: Tensor
    unwanted: Tensor
    words: list[str]
    disfluencies: Tensor
    prefixes: Texts
    clean: tuple[Texts, Tensor] | None
    log_clean: float

    @property
    def rate(self) -> float:
        """The share of greedy completions with something unwanted."""
        return self.unwanted.float().mean().item()


def _unwanted(task: Task, prompts: Tensor, completions: Tensor) -> Tensor:
    """(B,): which completions have something unwanted."""
    return task.texts(prompts, completions).unwanted.any(dim=1)


@torch.no_grad()
def _log_probabilities(model: Any, texts: Texts) -> Tensor:
    """(B,): of the completions."""
    parts = []
    for part in texts.batches():
        logits = model(**part.inputs).logits
        nll = cross_entropy(logits.transpose(1, 2), part.labels, reduction="none")
        parts.append(-(nll * part.active).sum(dim=1))
    return torch.cat(parts)


def yardstick(task: Task, original: Any, split: str, scale: Scale) -> Yardstick:
    torch.manual_seed(0)
    prompts = task.prompts(split, scale.test_prompts)
    greedy = task.generate(original, prompts, sampled=False)
    sampled = task.generate(original, prompts, sampled=True)
    prefixes = task.texts(prompts, sampled).with_reference(original)
    clean, log_clean = None, 0.0
    if task.sequence_truth:
        repeated = prompts[: scale.test_prompts // 4].repeat_interleave(scale.truth_samples, 0)
        said = task.generate(original, repeated, sampled=True)
        ok = ~_unwanted(task, repeated, said)
        shares = ok.view(-1, scale.truth_samples).float().mean(dim=1)
        log_clean = shares[shares > 0].log().mean().item()
        # One clean sample of each prompt, the first.
        place = torch.arange(len(ok))[ok]
        _, first = torch.unique(place // scale.truth_samples, return_inverse=True)
        place = place[torch.cat([torch.tensor([True]), first[1:] != first[:-1]])]
        texts = task.texts(repeated[place], said[place])
        clean = texts, _log_probabilities(original, texts)
    return Yardstick(
        prompts,
        greedy,
        _unwanted(task, prompts, greedy),
        task.words(prompts, greedy),
        task.disfluencies(prompts, greedy),
        prefixes,
        clean,
        log_clean,
    )


@torch.no_grad()
def divergence(task: Task, model: Any, prefixes: Texts) -> tuple[float, float]:
    """The mean over the prefixes of ``kl_parts``: what is left of the sets, and collateral damage, in nats."""
    left: list[Tensor] = []
    collateral: list[Tensor] = []
    for part in prefixes.batches():
        _, rows = tnt.tnt_loss(
            model(**part.inputs).logits,
            part.ref_logits,
            part.labels,
            part.active.float(),
            negative_ids=task.negative_ids(part),
            reduction="none",
            return_stats=True,
        )
        for parts, values in zip((left, collateral), kl_parts(rows), strict=True):
            parts.append(values[part.active])
    return torch.cat(left).mean().item(), torch.cat(collateral).mean().item()


def measure(task: Task, model: Any, of: Yardstick, greedy: Tensor | None = None) -> dict[str, Any]:
    """The figures of a model; with ``greedy`` (completions made in another way), only those of its completions.

    Returns:
        rate: share of greedy completions with something unwanted; sampled: the same when sampling.
        bleu, identical: greedy completions against the original's, 0 to 1; identical_clean: where its own was clean.
        broken, repeats, disfluent: share of the changed completions that are more broken, repeat more, either.
        left, collateral: nats a token, see ``divergence``; sequence_kl: to the original given that it is clean, nats.
    """
    figures: dict[str, Any] = {}
    if greedy is None:
        torch.manual_seed(1)
        greedy = task.generate(model, of.prompts, sampled=False)
        sampled = task.generate(model, of.prompts, sampled=True)
        figures["sampled"] = _unwanted(task, of.prompts, sampled).float().mean().item()
        figures["left"], figures["collateral"] = divergence(task, model, of.prefixes)
        if of.clean is not None:
            texts, before = of.clean
            gap = (before - _log_probabilities(model, texts)).mean().item()
            figures["sequence_kl"] = gap - of.log_clean
    same = (greedy == of.greedy).all(dim=1)
    said = task.words(of.prompts, greedy)
    figures["rate"] = _unwanted(task, of.prompts, greedy).float().mean().item()
    figures["bleu"] = sacrebleu.corpus_bleu(said, [of.words], force=True).score / 100
    figures["identical"] = same.float().mean().item()
    figures["identical_clean"] = same[~of.unwanted].float().mean().item()
    changed = ~same
    more = task.disfluencies(of.prompts, greedy) > of.disfluencies
    counts = {"broken": more[:, 0], "repeats": more[:, 1], "disfluent": more.any(dim=1)}
    for name, flags in counts.items():
        figures[name] = flags[changed].float().mean().item() if changed.any() else 0.0
    return figures
