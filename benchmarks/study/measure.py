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


@dataclass(frozen=True)
class Yardstick:
    """The original on one split of prompts.

    Attributes:
        prompts: (B, P).
        greedy: (B, L), its greedy completions.
        rate: the share of them with something unwanted.
        prefixes: samples of it with ``ref_logits``: the prefixes at which the distance to the exact update is taken.
        clean: samples of it with nothing unwanted, with their log-probability (B,); None without ``sequence_truth``.
        log_clean: the mean over prompts of the logarithm of the share of its samples that are clean.
    """

    prompts: Tensor
    greedy: Tensor
    rate: float
    prefixes: Texts
    clean: tuple[Texts, Tensor] | None
    log_clean: float


def _unwanted(task: Task, prompts: Tensor, completions: Tensor) -> Tensor:
    return (texts := task.texts(prompts, completions)).unwanted.logical_and(texts.active).any(dim=1)


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
    rate = _unwanted(task, prompts, greedy).float().mean().item()
    return Yardstick(prompts, greedy, rate, prefixes, clean, log_clean)


@torch.no_grad()
def divergence(task: Task, model: Any, prefixes: Texts) -> tuple[float, float]:
    """The mean KL(q*‖p) over the prefixes in nats: what is left of the sets, -log(1 - p(S)), and collateral damage."""
    left, collateral = [], []
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
        mine = -torch.log1p(-rows.negative_mass[part.active])
        left.append(mine)
        collateral.append((rows.kl[part.active] - mine).clamp(min=0))  # below 0 by rounding alone
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
        said = task.generate(model, of.prompts, sampled=True)
        figures["sampled"] = _unwanted(task, of.prompts, said).float().mean().item()
        figures["left"], figures["collateral"] = divergence(task, model, of.prefixes)
        if of.clean is not None:
            texts, before = of.clean
            gap = (before - _log_probabilities(model, texts)).mean().item()
            figures["sequence_kl"] = gap - of.log_clean
    first = _unwanted(task, of.prompts, of.greedy)
    same = (greedy == of.greedy).all(dim=1)
    mine, originals = (task.words(of.prompts, ids) for ids in (greedy, of.greedy))
    figures["rate"] = _unwanted(task, of.prompts, greedy).float().mean().item()
    figures["bleu"] = sacrebleu.corpus_bleu(mine, [originals], force=True).score / 100
    figures["identical"] = same.float().mean().item()
    figures["identical_clean"] = same[~first].float().mean().item()
    changed = ~same
    more = task.disfluencies(of.prompts, greedy) > task.disfluencies(of.prompts, of.greedy)
    counts = {
        "broken": more[:, 0],
        "repeats": more[:, 1],
        "disfluent": more.any(dim=1),
    }
    for name, flags in counts.items():
        share = flags[changed].float().mean().item() if changed.any() else 0.0
        figures[name] = share
    return figures
