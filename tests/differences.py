"""Launches whose logits are the policy's minus the reference's, against the same launches of the logits themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from oracle import F64, Batch, mixed_batch
from shards import launched

import tnt_kernels as tnt
from tnt_kernels._call import real_dtype


def pair(vocab: int, dtype: torch.dtype, gap: int = 0) -> tuple[Batch, Batch]:
    """A batch of unrounded logits (float32, or float64), and the same of differences in ``dtype``; ``gap`` columns
    between rows."""
    batch, real = mixed_batch(vocab), real_dtype(torch.empty(0, dtype=dtype))
    assert batch.ref_logits is not None
    r = batch.ref_logits.to(dtype)
    wide = torch.full((len(r), vocab + gap), torch.nan, dtype=dtype)
    differences = wide[:, gap:].copy_(batch.logits - batch.ref_logits)
    z = r.to(real) + differences.to(real)
    return replace(batch, logits=z, ref_logits=r.to(real)), replace(
        batch, logits=differences, ref_logits=r
    )


def check_differences(
    vocab: int, dtype: torch.dtype, backend: str, gap: int = 0, **options: object
) -> None:
    """Next to each other and far apart, with a factor of every row: once as logits, once as differences."""
    plain, differences = (batch.with_options(**options) for batch in pair(vocab, dtype, gap))
    upstream = torch.linspace(-1, 2, len(plain.labels)).to(plain.logits.dtype)
    upstream[1] = 0.0
    for later in (False, True):
        how: dict[str, Any] = {
            "reduction": "none", "upstream": upstream, "later": later, "stats": True,
        }  # fmt: skip
        want, got = (
            launched(backend, plain, **how),
            launched(backend, differences, **how, differences=True),
        )
        assert got.stats is not None
        assert want.stats is not None
        pairs = {
            "loss": (got.loss, want.loss),
            "gradient": (got.gradient, want.gradient),
            "diagnostics": (torch.stack(got.stats), torch.stack(want.stats)),
        }
        for name, (a, b) in pairs.items():
            rounding = torch.finfo(a.dtype).eps if name == "gradient" else 0.0
            tolerance = (1e-11 if b.dtype == F64 else 2e-5) + rounding
            least = 1e-12 if b.dtype == F64 else 1e-6
            torch.testing.assert_close(
                a.to(b.dtype), b, rtol=tolerance, atol=least, equal_nan=True,
                msg=lambda text, where=f"{name} {options} {later}": f"{where}: {text}",
            )  # fmt: skip
        assert (got.gradient[1] == 0).all()


def check_close_models(dtype: torch.dtype, backend: str, method: str) -> None:
    """Whose logits, rounded to 16 bits, would not differ at all."""
    generator, vocab = torch.Generator().manual_seed(0), 3000
    r = (3 * torch.randn(8, vocab, generator=generator, dtype=F64)).to(dtype)
    differences = (1e-3 * torch.randn(8, vocab, generator=generator, dtype=F64)).to(dtype)
    labels = torch.randint(vocab, (8,), generator=generator)
    exact = (r.double() + differences.double()).requires_grad_()
    want = tnt.tnt_loss(exact, r.double(), labels, method=method, reduction="none", backend="torch")
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)
    batch = Batch(differences, r, labels, None, {"method": method})
    scale = 2.0**14  # float16 has no smaller numbers than 6e-8
    upstream = torch.tensor([scale], dtype=real_dtype(r))
    got = launched(backend, batch, reduction="none", upstream=upstream, differences=True)
    error = (got.gradient.double() / scale - want_gradient).norm() / want_gradient.norm()
    assert error < 5e-4 + torch.finfo(dtype).eps
    assert (got.loss.double() - want.detach()).norm() / want.norm() < 5e-4
