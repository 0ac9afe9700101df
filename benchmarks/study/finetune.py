"""Annotates the original's own samples and finetunes a copy of it on them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import tnt_kernels as tnt
from benchmarks.study.task import Scale, Task, Texts

#: What is marked in a sample: the unwanted tokens that were sampled (the paper's annotation); the whole set of unwanted
#: tokens at each of its prefixes; every token of a sample that has an unwanted one.
ANNOTATIONS = ("token", "set", "sequence")


def row_weights(texts: Texts, annotation: str) -> Tensor:
    marked = texts.unwanted
    if annotation == "sequence":
        marked = marked.any(dim=1, keepdim=True).expand_as(marked)
    return texts.active * torch.where(marked, -1.0, 1.0)


def batch_loss(
    task: Task, logits: Tensor, texts: Texts, annotation: str, method: str, alpha: float
) -> Tensor:
    """The method's loss on a batch.

    A position with a set is a negative one: the divergences remove the set there and keep the rest, but NL and UL keep
    nothing. So with sets the baselines are both of their terms at every position: UL (or NL) of the set, LL of the
    label where it is not in the set.
    """
    weights = row_weights(texts, annotation)
    arguments = (logits, texts.ref_logits, texts.labels, weights)
    if annotation != "set":
        return tnt.tnt_loss(*arguments, method=method, alpha=alpha, inplace=True)
    ids = task.negative_ids(texts)
    objective = tnt.METHODS[method]
    if objective.negative in ("unlikelihood", "negative_likelihood"):
        push = tnt.Objective("none", objective.negative)
        keep = tnt.Objective(objective.positive, "none")
        return tnt.tnt_loss(*arguments, method=push, alpha=alpha, negative_ids=ids) + tnt.tnt_loss(
            *arguments, method=keep
        )
    return tnt.tnt_loss(*arguments, method=method, alpha=alpha, negative_ids=ids, inplace=True)


def finetune(
    task: Task,
    model: Any,
    texts: Texts,
    scale: Scale,
    *,
    annotation: str,
    method: str,
    alpha: float,
    learning_rate: float,
    steps: int,
    seed: int,
) -> Any:
    """A copy of ``model`` trained for ``steps`` on ``texts``, which hold their ``ref_logits``."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        batch = texts[torch.randint(len(texts), (scale.batch,))]
        logits = model(**batch.inputs).logits
        loss = batch_loss(task, logits, batch, annotation, method, alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model
