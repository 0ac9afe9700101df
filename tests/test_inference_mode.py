"""Tensors that ``torch.inference_mode()`` made, as a reference model leaves them: they serve like any others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import DTYPES, F16, F32, F64, NAN, OBJECTIVES, mixed_batch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tnt_kernels as tnt

ROWS, HIDDEN, VOCAB = 12, 4, 19
REDUCTIONS = ("mean", "sum", "none")
EACH = OBJECTIVES[:4]  # every loss of positive rows, and of negative ones
UPSTREAM = torch.linspace(-1, 2, ROWS)


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def of_logits(reduction: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a call, and the names of those that need a gradient."""
    batch = mixed_batch(VOCAB, dtype)
    found = {
        "logits": batch.logits,
        "ref_logits": batch.ref_logits,
        "labels": batch.labels,
        "weights": batch.weights,
        "alpha": torch.linspace(0, 2, ROWS),
        "negative_ids": batch.options["negative_ids"],
    }
    if reduction == "mean":
        found["normalizer"] = torch.tensor(7.0)
    return found, ["logits"]


def of_hidden(reduction: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[str]]:
    found, _ = of_logits(reduction, F64)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    del found["logits"], found["ref_logits"]
    heads = {
        "hidden": normal(ROWS, HIDDEN), "weight": normal(VOCAB, HIDDEN), "bias": normal(VOCAB),
        "ref_hidden": normal(ROWS, HIDDEN), "ref_weight": normal(VOCAB, HIDDEN), "ref_bias": normal(VOCAB),
    }  # fmt: skip
    return heads | found, ["hidden", "weight", "bias"]


CALLS = {tnt.tnt_loss: of_logits, tnt.linear_tnt_loss: of_hidden}


def gradients(loss: Any, tensors: dict[str, Tensor], needed: list[str], **options: Any) -> Any:
    """NaN where a row is broken, which compares as equal."""
    tensors = {n: x.clone().requires_grad_() if n in needed else x for n, x in tensors.items()}
    out = loss(**tensors, **options)
    leaves = [tensors[name] for name in needed]
    found = torch.autograd.grad(out, leaves, (UPSTREAM if out.dim() else torch.ones(())).to(out))
    return [x.nan_to_num(7.0) for x in (out.detach(), *found)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", CALLS, ids=lambda f: f.__name__)
def test_any_of_the_tensors(loss: Any, reduction: str, dtype: torch.dtype, backend: str) -> None:
    """All but those that need a gradient; of the model's own ones, each may be frozen."""
    tensors, needed = CALLS[loss](reduction, dtype)
    for objective in EACH:
        options = {"method": objective, "reduction": reduction, "backend": backend}
        frozen = [[name] for name in needed if len(needed) > 1]
        for made in (*([name] for name in tensors if name not in needed), *frozen, list(tensors)):
            trained = [x for x in needed if [x] != made]
            constant = set(made) - set(trained)
            given = {n: inference(x) if n in constant else x for n, x in tensors.items()}
            got = gradients(loss, given, trained, **options)
            want = gradients(loss, tensors, trained, **options)
            assert all(map(torch.equal, got, want)), (objective, made)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled(cpu: str) -> None:
    """Where backward does not read them. Where it does, it is the compiler that keeps tensors, and it refuses these."""
    tensors, needed = of_logits("mean", F32)
    made = {n: x if n in needed else inference(x) for n, x in tensors.items()}
    compiled = torch.compile(tnt.tnt_loss, fullgraph=True, backend="aot_eager")
    got, want = (gradients(f, x, needed) for f, x in ((compiled, made), (tnt.tnt_loss, tensors)))
    assert all(map(torch.equal, got, want))
    del made["normalizer"]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        gradients(compiled, made, needed, reduction="none")


@pytest.mark.parametrize(("dtype", "reduction"), [(F32, "none"), (F16, "mean")])
@pytest.mark.parametrize("loss", CALLS, ids=lambda f: f.__name__)
def test_contexts(loss: Any, dtype: torch.dtype, reduction: str, backend: str) -> None:
    """A view of a padded reference, backward twice, hooks on what is saved, activation checkpointing."""
    tensors, needed = CALLS[loss](reduction, dtype)
    name = "ref_logits" if loss is tnt.tnt_loss else "ref_weight"
    options = {"reduction": reduction, "backend": backend}
    want = gradients(loss, tensors, needed, **options)
    wide = torch.full((tensors[name].size(0), tensors[name].size(1) + 3), NAN, dtype=dtype)
    wide[:, 1:-2] = tensors[name]
    tensors = {n: x if n in needed else inference(x) for n, x in tensors.items()}
    tensors[name] = inference(wide)[:, 1:-2]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        got = gradients(loss, tensors, needed, **options)
    assert all(map(torch.equal, got, want))

    def twice(**arguments: Any) -> Tensor:
        out = loss(**arguments)
        leaves = [arguments[name] for name in needed]
        torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        return out

    assert all(map(torch.equal, gradients(twice, tensors, needed, **options), want))

    def checkpointed(**arguments: Any) -> Any:
        return checkpoint(loss, use_reentrant=False, **arguments)

    assert all(map(torch.equal, gradients(checkpointed, tensors, needed, **options), want))


@pytest.mark.parametrize("loss", CALLS, ids=lambda f: f.__name__)
def test_other_tensors_may_not_be_written_to_before_backward(loss: Any, backend: str) -> None:
    """Where they are kept, which autograd notices by their version."""
    for name in CALLS[loss]("none", F32)[0]:
        tensors, needed = CALLS[loss]("none", F32)
        if name in ("alpha", "weights") and loss is tnt.linear_tnt_loss:
            tensors[name] = tensors[name].float()  # or a copy would be kept
        given = {n: x.clone().requires_grad_() if n in needed else x for n, x in tensors.items()}
        out = loss(**given, reduction="none", backend=backend).sum()
        with torch.no_grad():
            given[name].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
