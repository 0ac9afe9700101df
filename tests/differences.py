"""Launches whose logits are the policy's minus the reference's, against the same launches of the logits themselves."""

from __future__ import annotations

import torch
from oracle import F64, Batch, mixed_batch
from shards import prepared
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels._call import ROW_COEFFICIENTS, ROW_DIAGNOSTICS, Kind, RowCall, real_dtype
from tnt_kernels.backends import BACKENDS


def pair(vocab: int, dtype: torch.dtype, gap: int = 0) -> tuple[Batch, Tensor]:
    """A batch of unrounded logits (float32, or float64), and the differences in ``dtype``; ``gap`` columns between
    rows."""
    batch, real = mixed_batch(vocab), real_dtype(torch.empty(0, dtype=dtype))
    assert batch.ref_logits is not None
    r = batch.ref_logits.to(dtype)
    wide = torch.full((len(r), vocab + gap), torch.nan, dtype=dtype)
    differences = wide[:, gap:].copy_(batch.logits - batch.ref_logits)
    z = r.to(real) + differences.to(real)
    return Batch(z, r.to(real), batch.labels, batch.weights, batch.options), differences


def launched(
    batch: Batch, backend: str, differences: Tensor | None, upstream: Tensor | None, waits: bool
) -> list[Tensor]:
    """Loss, diagnostics and gradient under "none"; the gradient at once, or by a launch of its own."""
    tensors, scalars, *_ = prepared(batch, backend, "none")
    z, (n, vocab) = batch.logits, batch.logits.shape
    call = RowCall(Kind.FUSED, z, tensors, scalars, 0, vocab)
    gradient = torch.empty_like(z)
    if differences is not None:
        ref_logits = tensors.ref_logits if tensors.ref_logits is not None else batch.ref_logits
        assert ref_logits is not None
        tensors = tensors._replace(ref_logits=ref_logits.to(differences.dtype))
        call = call._replace(logits=differences, tensors=tensors, differences=True)
        gradient = torch.empty_like(differences)
    loss, diagnostics = z.new_empty(n), z.new_empty((ROW_DIAGNOSTICS, n))
    launch = BACKENDS[backend].launch
    call = call._replace(loss=loss, diagnostics=diagnostics)
    if waits:
        coefficients = z.new_empty((n, ROW_COEFFICIENTS))
        launch(call._replace(coefficients=coefficients))
        call = RowCall(
            Kind.BACKWARD, call.logits, call.tensors, scalars, 0, vocab,
            coefficients=coefficients, differences=call.differences,
        )  # fmt: skip
    launch(call._replace(gradient=gradient, upstream=upstream))
    return [loss, diagnostics, gradient]


def check_differences(
    vocab: int, dtype: torch.dtype, backend: str, gap: int = 0, **options: object
) -> None:
    """Next to each other and far apart, with a factor of every row: once as logits, once as differences."""
    batch, differences = pair(vocab, dtype, gap)
    batch = batch.with_options(**options)
    upstream = torch.linspace(-1, 2, len(batch.labels)).to(batch.logits.dtype)
    upstream[1] = 0.0
    for waits in (False, True):
        want = launched(batch, backend, None, upstream, waits)
        got = launched(batch, backend, differences, upstream, waits)
        for name, a, b in zip(("loss", "diagnostics", "gradient"), got, want, strict=True):
            rounding = torch.finfo(a.dtype).eps if name == "gradient" else 0.0
            tolerance = (1e-11 if b.dtype == F64 else 2e-5) + rounding
            least = 1e-12 if b.dtype == F64 else 1e-6
            torch.testing.assert_close(
                a.to(b.dtype), b, rtol=tolerance, atol=least, equal_nan=True,
                msg=lambda text, where=f"{name} {options} {waits}": f"{where}: {text}",
            )  # fmt: skip
        assert (got[2][1] == 0).all()


def check_close_models(dtype: torch.dtype, backend: str, method: str) -> None:
    """Whose logits, rounded to 16 bits, would not differ at all."""
    generator, vocab = torch.Generator().manual_seed(0), 3000
    r = (3 * torch.randn(8, vocab, generator=generator, dtype=F64)).to(dtype)
    differences = (1e-3 * torch.randn(8, vocab, generator=generator, dtype=F64)).to(dtype)
    labels = torch.randint(vocab, (8,), generator=generator)
    exact = (r.double() + differences.double()).requires_grad_()
    want = tnt.tnt_loss(exact, r.double(), labels, method=method, reduction="none", backend="torch")
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)
    real = real_dtype(r)
    batch = Batch(exact.detach().to(real), r.to(real), labels, None, {"method": method})
    scale = 2.0**14  # float16 has no smaller numbers than 6e-8
    loss, _, gradient = launched(
        batch, backend, differences, torch.tensor([scale], dtype=real), False
    )
    error = (gradient.double() / scale - want_gradient).norm() / want_gradient.norm()
    assert error < 5e-4 + torch.finfo(dtype).eps
    assert (loss.double() - want.detach()).norm() / want.norm() < 5e-4
