"""``linear_tnt_loss``: the same as ``tnt_loss`` of the multiplied-out logits, without ever holding them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import BF16, F16, F32, F64, NAN
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tnt_kernels as tnt
from tnt_kernels import backends
from tnt_kernels._call import LossCall, RowTensors
from tnt_kernels._linear import chunks, matmul, plan, sizes
from tnt_kernels._linear.operators import WantedGradients, linear_gradients, linear_losses
from tnt_kernels._scalars import Scalars

ROWS, HIDDEN, REF_HIDDEN, VOCAB = 13, 6, 4, 37


class Heads(NamedTuple):
    """The arguments of a call, and those of its keywords that are the model's."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor
    weights: Tensor

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in self[:3]]


def heads(dtype: torch.dtype = F64, *, rows: int = ROWS, vocab: int = VOCAB) -> Heads:
    """Rows of every kind; row 3 is ignored, row 4 has weight 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    labels = torch.randint(vocab, (rows,), generator=generator)
    weights = torch.tensor([1.0, -1.0, 0.5, -0.3, 0.0]).repeat(-(-rows // 5))[:rows]
    if rows > 3:
        labels[3] = -100
    return Heads(
        normal(rows, HIDDEN), normal(vocab, HIDDEN), normal(vocab),
        normal(rows, REF_HIDDEN), normal(vocab, REF_HIDDEN),
        labels, weights.to(F64 if dtype == F64 else F32),
    )  # fmt: skip


def linear(x: Heads, leaves: list[Tensor] | None = None, **keywords: Any) -> Any:
    hidden, weight, bias = leaves or x[:3]
    return tnt.linear_tnt_loss(
        hidden,
        weight,
        x.ref_hidden,
        x.ref_weight,
        x.labels,
        x.weights,
        **{"bias": bias, **keywords},
    )


def whole(
    x: Heads,
    leaves: list[Tensor] | None = None,
    *,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    **keywords: Any,
) -> Any:
    """``tnt_loss`` of all logits at once, by autograd."""
    hidden, weight, bias = leaves or x[:3]

    def capped(logits: Tensor, cap: float | None) -> Tensor:
        return logits if cap is None else cap * torch.tanh(logits / cap)

    logits = capped(logit_scale * F.linear(hidden, weight, bias), softcap)
    ref_logits = capped(ref_logit_scale * F.linear(x.ref_hidden, x.ref_weight), ref_softcap)
    return tnt.tnt_loss(logits, ref_logits, x.labels, x.weights, **keywords)


def gradients(
    loss_of: Callable[..., Any], x: Heads, upstream: Tensor | float = 1.0, **keywords: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = x.leaves()
    loss = loss_of(x, leaves, **keywords)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss.detach(), torch.autograd.grad(
        loss, leaves, torch.as_tensor(upstream).to(loss).expand_as(loss)
    )


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    __tracebackhide__ = True
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0, atol=tolerance * float(b.abs().max())
        )


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 3.0, "ref_softcap": 2.0, "logit_scale": 0.7, "ref_logit_scale": 1.3},
    "scaled": {"logit_scale": 0.25, "temperature": 1.5, "alpha": 0.3, "smoothing": "uniform"},
}
PER_ROW = {
    "alpha": torch.linspace(0.5, 2, ROWS, dtype=F64),
    "negative_ids": torch.tensor([[-1, 4, 9]] + [[-1, -1, -1]] * 3 + [[5, 5, 8]] * (ROWS - 4)),
}


# --- agreement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", tnt.METHODS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_of_the_whole(reduction: str, settings: str, method: str, backend: str) -> None:
    keywords = {**SETTINGS[settings], "method": method, "reduction": reduction, "backend": backend}
    upstream = torch.linspace(-1, 2, ROWS) if reduction == "none" else 3.0
    for x, more in ((heads(), {}), (heads(), PER_ROW)):
        loss, grads = gradients(linear, x, upstream, chunk_size=4, **{**keywords, **more})
        want, want_grads = gradients(whole, x, upstream, **{**keywords, **more})
        assert_close([loss, *grads], [want, *want_grads], 1e-13)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("vocab", [70, 1001, 32003, 50257])
def test_columns_between_rows_are_not_read(vocab: int, dtype: torch.dtype, cpu: str) -> None:
    """A buffer's rows begin at cache lines. A CPU's bfloat16 matmul of 33 rows looks at what lies between them."""
    x = heads(dtype, rows=40, vocab=vocab)
    exact = Heads(*(y.double() if y.is_floating_point() else y for y in x))
    for reduction, chunk_size in itertools.product(("mean", "none"), (None, 39)):
        upstream = 40.0 if reduction == "mean" else torch.linspace(-1, 2, 40)
        loss, grads = gradients(linear, x, upstream, reduction=reduction, chunk_size=chunk_size)
        want, want_grads = gradients(whole, exact, upstream, reduction=reduction)
        assert_close([loss, *grads], [want, *want_grads], 3e-2)


@pytest.mark.parametrize("method", tnt.METHODS)
def test_gradcheck(method: str, backend: str) -> None:
    x = heads(rows=6, vocab=9)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda *leaves, reduction=reduction: linear(
                x,
                list(leaves),
                method=method,
                reduction=reduction,
                softcap=4.0,
                backend=backend,
                chunk_size=4,
            ),
            x.leaves(),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_stats(reduction: str, backend: str) -> None:
    x = heads()
    keywords = {"method": "tnfll", "reduction": reduction, "return_stats": True, "backend": backend}
    names = ("hidden", "ref_hidden", "labels", "weights")
    x = x._replace(**{n: (v := getattr(x, n)[:12]).view(3, 4, *v.shape[1:]) for n in names})
    for leaves in (None, x.leaves()):
        loss, stats = linear(x, leaves, chunk_size=5, **keywords)
        want, want_stats = whole(x, leaves, **keywords)
        torch.testing.assert_close(loss, want)
        for a, b in zip(stats, want_stats, strict=True):
            assert not a.requires_grad
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtypes(reduction: str, dtype: torch.dtype, backend: str) -> None:
    """Against float64 on the same inputs. 16-bit ones round the logits, as ``F.linear`` does, and the gradient once."""
    x = heads(dtype)
    exact = Heads(*(v.to(F64) if v.is_floating_point() else v for v in x))
    tolerance = {F32: 2e-6, BF16: 2e-2, F16: 2e-3}[dtype]
    for settings in SETTINGS.values():
        keywords = {**settings, "reduction": reduction}
        loss, grads = gradients(linear, x, backend=backend, chunk_size=5, **keywords)
        want, want_grads = gradients(whole, exact, **keywords)
        assert loss.dtype == F32
        assert [g.dtype for g in grads] == [dtype] * 3
        assert_close([loss, *grads], [want, *want_grads], tolerance)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("ref_dtype", [F64, F32, BF16, F16])
def test_a_reference_of_another_dtype(ref_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = heads(dtype)
    other = x._replace(ref_hidden=x.ref_hidden.to(ref_dtype), ref_weight=x.ref_weight.to(ref_dtype))
    loss, grads = gradients(linear, other, chunk_size=5)
    want, want_grads = gradients(linear, x)
    assert_close([loss, *grads], [want, *want_grads], 4 * torch.finfo(ref_dtype).eps + 1e-6)


def close_heads(
    dtype: torch.dtype, shared: bool, share: float, step: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, ref_hidden, ref_weight, labels: a ``share`` of what both models have is a ``step`` apart, and
    at least so far that bfloat16 knows it."""
    rows, vocab, width = 24, 2000, 64
    generator = torch.Generator().manual_seed(0)
    apart = 1 + max(step, 2**-8, torch.finfo(dtype).eps)

    def moved(x: Tensor) -> Tensor:
        signs = torch.randn(x.shape, generator=generator).sign()
        factor = torch.where(torch.rand(x.shape, generator=generator) < share, apart, 1.0) ** signs
        return (x.double() * factor).to(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    ref_hidden = normal(rows, width).to(dtype)
    ref_weight = (3 / width**0.5 * normal(vocab, width)).to(dtype)
    weight = ref_weight if shared else moved(ref_weight)
    return (
        moved(ref_hidden),
        weight,
        ref_hidden,
        ref_weight,
        torch.randint(vocab, (rows,), generator=generator),
    )


def errors_of_close_heads(
    dtype: torch.dtype,
    shared: bool,
    share: float,
    step: float,
    device: str = "cpu",
    **keywords: Any,
) -> tuple[float, list[float]]:
    """KL, and the relative errors of loss and gradients, against float64 on the same inputs."""
    heads, found = close_heads(dtype, shared, share, step), []
    for kind, place in ((F64, "cpu"), (dtype, device)):
        hidden, weight, ref_hidden, ref_weight = (x.to(place, kind) for x in heads[:4])
        hidden.requires_grad_()
        if shared:
            ref_weight = weight
        else:
            weight.requires_grad_()
        more = {} if kind == F64 else keywords
        loss = tnt.linear_tnt_loss(
            hidden, weight, ref_hidden, ref_weight, heads[4].to(place), reduction="sum", **more
        )
        leaves = [hidden] if shared else [hidden, weight]
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    want, got = ([x.to("cpu", F64) for x in some] for some in found)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    return want[0].item() / len(heads[4]), errors


#: Of what is a step apart, and by how much: KLs from 0.2 to 1e-6.
DISTANCES = ((1.0, 0.2), (1.0, 0.05), (1.0, 0.012), (0.5, 0.0), (0.05, 0.0), (0.004, 0.0))


def check_close_heads(dtype: torch.dtype, device: str = "cpu", backend: str | None = None) -> None:
    """0.3 % of bfloat16's gradients, whose own rounding is 0.17 % and that of the logits' gradient as much."""
    most = {BF16: 3e-3, F16: 2e-3, F32: 1e-3}[dtype]
    found = []
    for share, step in DISTANCES:
        for shared in (False, True):
            kl, (loss, *errors) = errors_of_close_heads(
                dtype, shared, share, step, device, backend=backend
            )
            found.append(kl)
            assert loss < 1e-3, (kl, shared)
            assert max(errors) < most, (kl, shared, errors)
    assert max(found) > 0.1
    assert min(found) < 2e-6


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_close_models(dtype: torch.dtype, cpu: str) -> None:
    check_close_heads(dtype)


def test_pairs_of_16_bits(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their error is that of the reference's rounding, at any distance; of rounded logits it is all there is."""
    for play in (False, True):
        if play:
            play_a_gpu(monkeypatch)
        for share, step in DISTANCES:
            kl, (loss, error) = errors_of_close_heads(BF16, True, share, step, logits_dtype=BF16)
            assert loss < 5e-3, kl
            assert error < 0.02, kl
    hidden, weight, ref_hidden, _, labels = close_heads(BF16, True, *DISTANCES[-1])
    rounded = [F.linear(x, weight).double().requires_grad_() for x in (hidden, ref_hidden)]
    exact = [F.linear(x.double(), weight.double()).requires_grad_() for x in (hidden, ref_hidden)]
    found = []
    for z, r in (rounded, exact):
        tnt.tnt_loss(z, r.detach(), labels).backward()
        found.append(z.grad)
    assert (found[0] - found[1]).norm() > found[1].norm()


def play_a_gpu(
    monkeypatch: pytest.MonkeyPatch, adds: bool = True
) -> list[tuple[int, ...] | tuple[tuple[int, ...], float]]:
    """Its matmuls of 16-bit matrices with float32 results, by those of float32 matrices; returns the calls' shapes,
    with their beta if they add to what is there."""
    shapes: list[Any] = []

    def wide_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
        assert a.dtype == b.dtype != out.dtype == F32
        shapes.append(tuple(out.shape))
        torch.mm(a.float(), b.float(), out=out)

    def wide_addmm_(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
        assert a.dtype == b.dtype != out.dtype == F32
        shapes.append((tuple(out.shape), beta))
        out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)

    for module in (sizes, matmul):
        monkeypatch.setattr(module, "keeps_float32", lambda device_type: True)
    monkeypatch.setattr(matmul, "adds_to_float32", lambda device_type: adds)
    monkeypatch.setattr(matmul, "_wide_mm", wide_mm)
    monkeypatch.setattr(matmul, "_wide_addmm_", wide_addmm_)
    return shapes


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_what_matmuls_sum_in_float32_stays_so(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does it, with its matmul played by one of float32 matrices."""
    shapes = play_a_gpu(monkeypatch)
    check_close_heads(dtype)
    shapes.clear()
    errors_of_close_heads(dtype, True, *DISTANCES[0])
    assert shapes == [(24, 2000)] * 2 + [(24, 64)]  # reference, differences, hidden's gradient
    x = heads(dtype)
    exact = Heads(*(v.to(F64) if v.is_floating_point() else v for v in x))
    for settings in SETTINGS.values():
        for reduction in ("mean", "none"):
            keywords = {**settings, "reduction": reduction}
            loss, grads = gradients(linear, x, chunk_size=5, **keywords)
            want, want_grads = gradients(whole, exact, **keywords)
            assert_close([loss], [want], 1e-5)
            assert_close(grads, want_grads, 2 * torch.finfo(dtype).eps)
    # a reference of another dtype, and no gradient: no 16-bit buffer at all
    other = x._replace(ref_hidden=x.ref_hidden.float(), ref_weight=x.ref_weight.float())
    torch.testing.assert_close(linear(other), linear(x))


def test_where_matmuls_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(device: str, cuda: str | None) -> bool:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return matmul.keeps_float32.__wrapped__(device)

    assert found("cuda", "13.0") == hasattr(torch.ops.aten.mm, "dtype_out")
    assert not found("cuda", None)  # ROCm
    assert not found("cpu", "13.0")
    for keeps, version, adds in (
        (True, "2.9.1", False), (True, "2.10.0", True), (True, "2.11.0+cu130", True), (False, "2.13.0", False),
    ):  # fmt: skip
        monkeypatch.setattr(matmul, "keeps_float32", lambda device_type, keeps=keeps: keeps)
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert matmul.adds_to_float32.__wrapped__("cuda") == adds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_close_models_on_a_gpu(dtype: torch.dtype, name: str) -> None:
    why_not = backends.BACKENDS[name].why_not(torch.empty(1, 8, device="cuda"))
    if why_not:
        pytest.skip(why_not)
    check_close_heads(dtype, "cuda", name)
    if dtype == BF16:
        for share, step in DISTANCES:
            _, (_, error) = errors_of_close_heads(
                dtype, True, share, step, "cuda", backend=name, logits_dtype=dtype
            )
            assert error < 0.02


def test_chunks_do_not_matter(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = heads()
    want = gradients(linear, x, method="tnrll", backend=backend)
    for size in (1, 2, 5, 12, 100):
        loss, grads = gradients(linear, x, method="tnrll", backend=backend, chunk_size=size)
        assert_close([loss, *grads], [want[0], *want[1]], 1e-14)
    for budget in (1, 3000):
        monkeypatch.setitem(sizes.CHUNK_BYTES, "cpu", budget)
        for dtype, tolerance in ((F64, 1e-14), (F16, 3e-3), (BF16, 3e-2)):
            loss, grads = gradients(linear, heads(dtype), method="tnrll", backend=backend)
            assert_close([loss, *grads], [want[0], *want[1]], tolerance)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradients_wait_for_large_matmuls(
    dtype: torch.dtype, adds: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few or many rows of 16 bits wait for a matmul: the same gradients, of no more matmuls than must be."""
    shapes = play_a_gpu(monkeypatch, adds)
    x = heads(dtype)
    exact = Heads(*(v.to(F64) if v.is_floating_point() else v for v in x))
    keywords = {"method": "tnrll", "logit_scale": 0.5, "max_active_rows": 10}
    want, want_grads = gradients(whole, exact, method="tnrll", logit_scale=0.5)
    of_weight = {(VOCAB, HIDDEN), ((VOCAB, HIDDEN), 0.0), ((VOCAB, HIDDEN), 1.0)}
    for waiting, matmuls in ((0, 4), (3, 4), (6, 2), (11, 1)):  # chunks of 3, 3, 3 and 1 rows
        found = sizes.Sizes(3, max(waiting, 3), waiting >= 10)
        monkeypatch.setattr(chunks, "sizes_of", lambda *_, found=found: found)
        shapes.clear()
        loss, grads = gradients(linear, x, backend=backend, **keywords)
        assert_close([loss], [want], 1e-5)
        assert_close(grads, want_grads, 2 * torch.finfo(dtype).eps)
        found = [shape for shape in shapes if shape in of_weight]
        if dtype == F16:
            products = [(VOCAB, HIDDEN)] if not adds else [((VOCAB, HIDDEN), 0.0)]
            assert found == products * matmuls
        elif matmuls == 1:
            assert found == []  # no float32 sum
        elif adds:
            assert found == [((VOCAB, HIDDEN), 0.0)] + [((VOCAB, HIDDEN), 1.0)] * (matmuls - 1)
        else:
            assert found == [(VOCAB, HIDDEN)] * matmuls


def test_what_fits_into_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: chunks are whole tiles of a matmul, and nothing is larger than it may be."""
    for module in (sizes, matmul):
        monkeypatch.setattr(module, "keeps_float32", lambda device_type: True)

    def fitted(
        rows: int,
        width: int = 4096,
        vocab: int = 128256,
        wanted: tuple[bool, ...] = (True, True, False),
        dtype: torch.dtype = BF16,
        rounds: bool = False,
    ) -> sizes.Sizes:
        with torch.device("meta"):
            hidden, weight = (torch.empty(n, width, dtype=dtype) for n in (rows, vocab))
        t = plan.LinearTensors(hidden, weight, None, hidden, weight, None)
        scalars = plan.LinearScalars(None, None, 1.0, 1.0, vocab, None, None, rounds)
        layout = sizes.make_layout(t, scalars, True, rounds, wanted)
        found = sizes.sizes_of(t, scalars, rows, wanted, vocab, layout)
        assert found.one_matmul == (found.waiting == rows)
        budget, pair = (1 << 30) + weight.nbytes, 2 if rounds else 8  # one of the pair waits
        waiting = found.waiting * vocab * (0 if dtype == F32 else 2)
        assert found.chunk * vocab * pair <= budget
        sum_bytes = 4 * vocab * width if found.one_matmul else 0
        assert found.chunk * vocab * pair + waiting <= budget + sum_bytes
        assert found.chunk % 128 == 0 or found.chunk == rows < 128
        return found

    assert fitted(8192) == (1664, 8192, True)  # one matmul, as rows are 2 H at most
    assert fitted(100) == (100, 100, True)
    assert fitted(1 << 20) == (896, 2688, False)
    assert fitted(8192, wanted=(True, False, False)) == (1408, 1408, False)  # a frozen head
    assert fitted(8192, wanted=(True, False, False), rounds=True) == (2816, 2816, False)
    assert fitted(8192, wanted=(False, False, False)).waiting == 0
    assert fitted(8192, dtype=F16).waiting < 8192  # whose gradient stays float32 until backward
    assert fitted(8192, dtype=F32) == (2048, 0, False)
    # Chunks of a wide vocabulary are no fewer rows: the budget grows with the weight.
    assert fitted(1 << 20, 2304, 262144).chunk >= 384
    assert fitted(1 << 20, 3584, 152064).chunk >= 512


def test_a_fixed_point(backend: str) -> None:
    """Policy and reference the same (LoRA at its start: tied weights): nothing moves, to the last bit."""
    x = heads(F32, vocab=1000)
    hidden, weight, bias = x.leaves()
    loss = tnt.linear_tnt_loss(
        hidden, weight, hidden.detach(), weight.detach(), x.labels, x.weights.abs(),
        bias=bias, ref_bias=bias.detach(), softcap=2.0, ref_softcap=2.0, chunk_size=4, backend=backend,
    )  # fmt: skip
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_padded_vocabulary(backend: str) -> None:
    x = heads()
    padded = F.pad(x.weight, (0, 0, 0, 3), value=NAN)
    ref_padded = F.pad(x.ref_weight, (0, 0, 0, 5), value=NAN)
    leaves = [x.hidden, padded, F.pad(x.bias, (0, 3), value=NAN)]
    leaves = [v.detach().clone().requires_grad_() for v in leaves]
    loss = linear(x._replace(ref_weight=ref_padded), leaves, vocab_size=VOCAB, backend=backend)
    got = torch.autograd.grad(loss, leaves)
    want, want_grads = gradients(linear, x, backend=backend)
    assert torch.equal(loss, want)
    assert torch.equal(got[0], want_grads[0])
    for a, b in zip(got[1:], want_grads[1:], strict=True):
        assert torch.equal(a[:VOCAB], b)
        assert (a[VOCAB:] == 0).all()
    view = linear(x, [x.hidden, padded[:VOCAB], x.bias], backend=backend)
    assert torch.equal(view, want)


# --- rows that need nothing ---------------------------------------------------------------------


def test_rows_that_need_nothing_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    x, multiplied = heads(), []
    addmm = torch.addmm

    def recorded(addend: Tensor, rows: Tensor, *more: Any, **keywords: Any) -> Tensor:
        multiplied.append(tuple(rows.shape))
        return addmm(addend, rows, *more, **keywords)

    monkeypatch.setattr(torch, "addmm", recorded)
    # rows 0 ... 12: weights 1 -1 .5 (ignored) 0, three times; 10 active, 4 negative of them
    for method, reference in (("tnff", 10), ("tnfll", 4), ("ul+ll", 0)):
        multiplied.clear()
        gradients(linear, x, method=method)
        assert sum(n for n, width in multiplied if width == HIDDEN) == 10
        assert sum(n for n, width in multiplied if width == REF_HIDDEN) == reference


@pytest.mark.parametrize("most", [None, 10, 11, 13, 50])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_of_an_ignored_row_is_seen(reduction: str, most: int | None, backend: str) -> None:
    x = heads()
    want, want_grads = gradients(linear, x, reduction=reduction, method="tnfll", backend=backend)
    for v in (x.hidden, x.ref_hidden):
        v[[3, 4]] = NAN
    loss, grads = gradients(
        linear,
        x,
        reduction=reduction,
        method="tnfll",
        backend=backend,
        max_active_rows=most,
        chunk_size=4,
    )
    assert_close([loss, *grads], [want, *want_grads], 1e-13)
    assert (grads[0][[3, 4]] == 0).all()


def test_more_active_rows_than_promised() -> None:
    with pytest.raises(ValueError, match="max_active_rows is 9, expected at least 10"):
        linear(heads(), max_active_rows=9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_no_active_row(dtype: torch.dtype, reduction: str, backend: str) -> None:
    some = heads(dtype)
    for x in (some._replace(weights=torch.zeros(ROWS)), heads(dtype, rows=0)):
        for most in (None, 2):
            loss, grads = gradients(
                linear, x, reduction=reduction, backend=backend, max_active_rows=most
            )
            assert loss.shape == (x.labels.shape if reduction == "none" else ())
            assert [g.shape for g in grads] == [v.shape for v in x[:3]]
            assert all((v == 0).all() for v in (loss, *grads))


def test_normalizer(backend: str) -> None:
    x = heads()
    for normalizer in (7, torch.tensor(7.0), 0):
        loss, grads = gradients(linear, x, normalizer=normalizer, backend=backend, chunk_size=3)
        want, want_grads = gradients(whole, x, normalizer=normalizer, backend=backend)
        assert_close([loss, *grads], [want, *want_grads], 1e-13)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_only_if_required(reduction: str, wanted: tuple[bool, ...]) -> None:
    x = heads()
    _, want = gradients(linear, x, reduction=reduction)
    leaves = [v.detach().clone().requires_grad_(w) for v, w in zip(x[:3], wanted, strict=True)]
    loss = linear(x, leaves, reduction=reduction).sum()
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for leaf, gradient in zip(leaves, want, strict=True):
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)
        assert (leaf.grad is not None) == leaf.requires_grad


@pytest.mark.parametrize("dtype", [F64, F16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward(reduction: str, dtype: torch.dtype, backend: str) -> None:
    leaves = heads(dtype).leaves()
    loss = linear(heads(dtype), leaves, reduction=reduction, backend=backend).sum()
    first = torch.autograd.grad(
        loss, leaves, torch.tensor(2.0, dtype=loss.dtype), retain_graph=True
    )
    for a, b in zip(torch.autograd.grad(loss, leaves), first, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_double_backward_raises() -> None:
    x = heads()
    leaves = x.leaves()
    (gradient, *_) = torch.autograd.grad(linear(x, leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_do_not_underflow(reduction: str, backend: str) -> None:
    """A mean of rows that hardly count, all below float16's least number until the scale arrives, and one that does."""
    x = heads(F64, rows=60, vocab=500)
    near = x.hidden + 0.2 * x.hidden.roll(1)
    weights = x.weights.abs().float() * 1e-4
    weights[1] = -1.0
    half = Heads(
        near.half(), x.weight.half(), torch.zeros(500).half(),
        x.hidden.half(), x.weight.half(), x.labels, weights,
    )  # fmt: skip
    exact = Heads(*(v.to(F64) if v.is_floating_point() else v for v in half))
    scale, normalizer = 2.0**24, 2.0**14
    keywords: dict[str, Any] = {"reduction": reduction}
    upstream = scale / normalizer
    if reduction == "mean":
        keywords["normalizer"], upstream = normalizer, scale
    _, grads = gradients(linear, half, upstream, backend=backend, **keywords)
    _, want = gradients(whole, exact, upstream, **keywords)
    active = weights != 0
    active[3] = False
    assert (want[0][active].abs().amax(-1) / scale).median() < torch.finfo(
        F16
    ).smallest_normal / 1e3
    # of every row; beyond what float16 logits lose, there is but the rounding of the result
    error = (grads[0].double() - want[0])[active].norm(dim=-1) / want[0][active].norm(dim=-1)
    assert error.max() < 0.03
    for got, expected in zip(grads, want, strict=True):
        assert (got.double() - expected).norm() / expected.norm() < 0.01
    # where only rows that hardly count reach: the weight's gradient without row 1
    half.weights[1] = exact.weights[1] = 0.0
    _, (_, got, _) = gradients(linear, half, upstream, backend=backend, **keywords)
    _, (_, expected, _) = gradients(whole, exact, upstream, **keywords)
    assert (got.double() - expected).norm() / expected.norm() < 0.01


def test_float16_gradients_do_not_overflow(backend: str) -> None:
    """Many rows push the same way; of 60 * 4000, only the mean is a float16."""
    rows, vocab = 4000, 100
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator).half()
    hidden[:, 0] = 60.0
    weight = (torch.randn(vocab, 8, generator=generator) / 16).half()
    labels, weights = torch.zeros(rows, dtype=torch.int64), -torch.ones(rows)
    found = []
    for dtype in (F16, F64):
        leaf = weight.to(dtype, copy=True).requires_grad_()
        arguments = (hidden.to(dtype), leaf, None, None, labels, weights.to(leaf))
        tnt.linear_tnt_loss(*arguments, method="ul+ll", backend=backend).backward()
        found.append(leaf.grad.double())
    assert (found[0] - found[1]).norm() < 2e-3 * found[1].norm()


def test_an_undefined_row_spoils_no_other(backend: str) -> None:
    for dtype in (F32, F16):
        x = heads(dtype)
        x.hidden[0] = NAN
        _, (hidden, weight, _) = gradients(linear, x, backend=backend)
        assert hidden[0].isnan().all()
        assert hidden[1:].isfinite().all()
        assert weight.isnan().all()


# --- around the call ----------------------------------------------------------------------------


def test_module() -> None:
    x = heads()
    module = tnt.LinearTNTLoss(method="tnrf", softcap=3.0)
    assert "softcap=3.0" in repr(module)
    got = module(x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.labels, x.weights, bias=x.bias)
    assert torch.equal(got, linear(x, method="tnrf", softcap=3.0))
    with pytest.raises(TypeError, match="LinearTNTLoss: unknown keyword 'inplace'"):
        tnt.LinearTNTLoss(inplace=True)
    with pytest.raises(TypeError, match="LinearTNTLoss: 'method' at call"):
        module(x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.labels, method="tnff")


def test_autocast(backend: str) -> None:
    """As ``F.linear`` under autocast: 16-bit matmuls, gradients in the parameters' dtype."""
    x = heads(F32)
    leaves = x.leaves()
    with torch.autocast("cpu", dtype=BF16):
        loss = linear(x, leaves, backend=backend)
    grads = torch.autograd.grad(loss, leaves)
    half = Heads(*(v.to(BF16) if v.is_floating_point() else v for v in x[:5]), *x[5:])
    want, want_grads = gradients(linear, half, backend=backend)
    assert torch.equal(loss, want)
    assert [g.dtype for g in grads] == [F32] * 3
    assert_close(grads, want_grads, 0)


def test_one_head_of_both_models_stays_one(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cast once by autocast; padded; with a bias; and told from two heads with the same numbers."""
    seen: list[bool] = []
    difference = matmul.Head.differences

    def noted(*arguments: Any) -> None:
        seen.append(True)
        difference(*arguments)

    monkeypatch.setattr(matmul.Head, "differences", noted)
    x = heads(F32)
    hidden, weight, bias = x.leaves()
    ref_hidden, labels = hidden.detach() + 0.1, x.labels.clamp(max=20)

    def call(ref_weight: Tensor, **keywords: Any) -> tuple[int, Tensor]:
        seen.clear()
        loss = tnt.linear_tnt_loss(
            hidden, weight, ref_hidden, ref_weight, labels, x.weights, backend=cpu, **keywords
        )
        return len(seen), loss.detach()

    shared, loss = call(weight.detach())
    apart, want = call(weight.detach().clone())
    assert (shared, apart) == (1, 0)
    torch.testing.assert_close(loss, want)
    with torch.autocast("cpu", dtype=BF16):
        assert call(weight.detach())[0] == 1
        with pytest.raises(ValueError, match="do not share their head: two weights or biases"):
            call(weight.detach().clone(), logits_dtype=BF16)
        assert call(weight.detach(), logits_dtype=BF16)[0] == 1
    both = {"bias": bias, "ref_bias": bias.detach()}
    assert call(weight.detach(), **both)[0] == 1
    torch.testing.assert_close(
        call(weight.detach(), **both)[1], call(weight.detach().clone(), **both)[1]
    )
    for change in (
        {"bias": bias}, {"softcap": 3.0}, {"ref_softcap": 3.0}, {"logit_scale": 0.5},
        {**both, "ref_bias": bias.detach().clone()},
    ):  # fmt: skip
        assert call(weight.detach(), **change)[0] == 0
    assert call(weight.detach(), logit_scale=0.5, ref_logit_scale=0.5)[0] == 1
    assert call(weight.detach()[: VOCAB - 2], vocab_size=30)[0] == 1
    assert call(weight.detach()[1:], vocab_size=30)[0] == 0


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_results_hardly_depend_on_the_chunks(
    dtype: torch.dtype, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's loss does not at all; gradients by one rounding of their dtype, and the order of float32 sums."""
    for play in (False, True):
        if play:
            play_a_gpu(monkeypatch)
        hidden, weight, ref_hidden, ref_weight, labels = close_heads(dtype, False, 1.0, 0.05)
        found = []
        for chunk_size in (24, 16, 5, 1):
            leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
            loss = tnt.linear_tnt_loss(
                *leaves, ref_hidden, ref_weight, labels, chunk_size=chunk_size, backend=cpu
            )
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for other in found[1:]:
            torch.testing.assert_close(other[0], found[0][0], rtol=1e-6, atol=0)
            for a, b in zip(other[1:], found[0][1:], strict=True):
                bound = 2 * torch.finfo(dtype).eps * b.double().abs()
                least = 1e-3 * b.double().norm() / b.numel() ** 0.5
                assert ((a.double() - b.double()).abs() <= bound + least).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed_trunk(reduction: str) -> None:
    x = heads()
    trunk = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()).double()
    results = []
    for run in (trunk, lambda h: checkpoint(trunk, h, use_reentrant=False)):
        weight = x.weight.clone().requires_grad_()
        loss = linear(
            x, [run(x.hidden.requires_grad_()), weight, x.bias], reduction=reduction
        ).sum()
        results.append(torch.autograd.grad(loss, [weight, *trunk.parameters()]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


COMPILED = [{}, {"reduction": "none"}, {"return_stats": True}, {"method": "tnfll", "softcap": 3.0}]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("keywords", COMPILED, ids=str)
def test_compiled(keywords: dict[str, Any], dtype: torch.dtype, cpu: str) -> None:
    """In one graph; other numbers of active rows, and from the second on of rows, do not recompile."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, x: Heads) -> Any:
        return linear(x, [torch.tanh(hidden), weight, bias], backend=cpu, chunk_size=4, **keywords)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for rows, most in ((ROWS, 13), (ROWS, 7), (16, 12), (21, 21)):
        x = heads(dtype, rows=rows)
        x.weights[most:] = 0
        results = []
        for function in (step, compiled):
            leaves = x.leaves()
            loss, stats = out if isinstance(out := function(*leaves, x), tuple) else (out, ())
            results.append(
                [loss.detach(), *stats, *torch.autograd.grad((loss * 0.5).sum(), leaves)]
            )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    assert counter.frame_count <= 2
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_under_autocast(cpu: str) -> None:
    torch.compiler.reset()
    x = heads(F32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return linear(x, list(leaves), backend=cpu)

    with torch.autocast("cpu", dtype=BF16):
        want = linear(x, backend=cpu)
    assert torch.equal(step(*x.leaves()).detach(), want)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [F32, F16])
def test_opcheck(dtype: torch.dtype, cpu: str) -> None:
    x = heads(dtype, rows=6, vocab=9)
    tensors = plan.LinearTensors(*x[:3], x.ref_hidden, x.ref_weight, None)
    rows = RowTensors(None, x.labels % 8, x.weights - 2, None, None, None)
    linear = plan.LinearScalars(3.0, None, 1.0, 1.0, 8, 2, None, False)
    scalars = Scalars(1, 2, 1.0, 1e-6, False, None, 1.0, -100, "mean", None)

    def check(operator: Any, call: LossCall, *more: Any) -> None:
        flat = operator.one_by_one(tensors, linear, call, *more)
        torch.library.opcheck(operator.overload, tuple(flat))

    for reduction, stats, wanted in (
        ("mean", True, (True, True, True)),
        ("sum", False, (True, False, False)),
        ("none", False, (False, False, False)),
    ):
        scalars = scalars._replace(reduction=reduction)
        call = LossCall(rows, scalars, cpu, False, stats, None)
        check(linear_losses, call, WantedGradients(*wanted))
    check(linear_gradients, call, torch.rand(6), WantedGradients(True, True, True))


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_memory_beyond_the_gradients(
    with_bias: bool,
    frozen: bool,
    reduction: str,
    dtype: torch.dtype,
    cpu: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The chunk's buffers, however many rows; with a frozen head not even a gradient of its size."""
    rows, vocab, width, budget = 96, 20_000, 32, 4 << 20
    monkeypatch.setitem(sizes.CHUNK_BYTES, "cpu", budget)
    labels = torch.randint(vocab, (rows,))
    hidden = torch.randn(rows, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, dtype=dtype).requires_grad_(not frozen)
    reference = (hidden.detach() + 0.1, weight.detach())
    bias = torch.zeros(vocab, dtype=dtype, requires_grad=True) if with_bias else None
    leaves = [hidden, *([] if frozen else [weight]), *([] if bias is None else [bias])]

    # what a call holds at once: blocks of at least 4 KiB, by the profiler's stream of allocations
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        loss = tnt.linear_tnt_loss(
            hidden, weight, *reference, labels, bias=bias, reduction=reduction, backend=cpu
        )
        del loss
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    gradient_bytes = 0 if reduction == "none" else sum(v.numel() * 4 for v in leaves)
    if dtype == BF16 and not frozen and reduction == "mean":
        gradient_bytes += weight.numel() * 2  # the float32 sum and what it is cast to
    assert budget // 4 < most <= budget + gradient_bytes + (1 << 20) + 64 * rows


# --- bad input ----------------------------------------------------------------------------------


def test_errors_name_what_came_and_what_was_expected(cpu: str) -> None:
    x = heads(F32)
    good = dict(
        zip(
            ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "labels", "weights"),
            x,
            strict=True,
        )
    )
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"hidden": 3}, TypeError, "hidden: int, expected a tensor"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden: shape \(\), expected \(..., H\)"),
        ({"hidden": x.hidden.int()}, TypeError, "hidden: dtype torch.int32, expected float32"),
        ({"weight": x.weight[:, :5]}, ValueError, r"weight: shape \(37, 5\), expected \(V, 6\), .* \(13, 6\)"),
        ({"weight": x.weight.double()}, TypeError, "weight: dtype torch.float64, expected torch.float32"),
        ({"weight": x.weight.to("meta")}, ValueError, "weight: on meta, expected cpu, where hidden is"),
        ({"bias": x.bias[:-1]}, ValueError, r"bias: shape \(36,\), expected \(37,\), because weight"),
        ({"bias": x.bias.half()}, TypeError, "bias: dtype torch.float16"),
        ({"ref_hidden": None}, ValueError, "ref_hidden: None, expected a tensor"),
        ({"ref_weight": None}, ValueError, "ref_weight: None, expected a tensor"),
        ({"ref_hidden": x.ref_hidden[:5]}, ValueError, r"ref_hidden: shape \(5, 4\), expected \(13, 4\)"),
        ({"ref_weight": x.weight}, ValueError, r"ref_weight: shape \(37, 6\), expected \(V, 4\), .* \(13, 4\)"),
        ({"ref_weight": x.ref_weight[:30]}, ValueError, r"ref_weight: shape \(30, 4\), expected \(37, 4\).*vocab_"),
        ({"ref_weight": x.ref_weight.clone().requires_grad_()}, ValueError, "ref_weight: requires grad"),
        ({"ref_hidden": x.ref_hidden.clone().requires_grad_()}, ValueError, "ref_hidden: requires grad"),
        ({"ref_bias": x.bias[:2]}, ValueError, r"ref_bias: shape \(2,\), expected \(37,\)"),
        ({"vocab_size": 38}, ValueError, "vocab_size is 38, expected at most 37, the number of rows of weight"),
        ({"vocab_size": 0}, ValueError, "vocab_size is 0, expected at least 1"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0, expected at least 1"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size: float, expected an int"),
        ({"max_active_rows": 0}, ValueError, "max_active_rows is 0"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a finite number above 0"),
        ({"logit_scale": "1"}, TypeError, "logit_scale: str, expected a number"),
        ({"labels": x.labels[:-1]}, ValueError, r"labels: shape \(12,\), expected \(13,\), that of hidden without H"),
        ({"labels": x.labels.clone().fill_(37)}, ValueError, "labels: row 0 has label 37, expected 0 <= label < V"),
        ({"weights": x.weights[:-1]}, ValueError, "weights: shape .* that of hidden without H"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"method": "x"}, ValueError, "method is 'x'"),
        ({"backend": "x"}, ValueError, "backend is 'x'"),
        ({"logits_dtype": "bfloat16"}, TypeError, "logits_dtype: str, expected torch.bfloat16 or None"),
        ({"logits_dtype": BF16}, ValueError, "logits_dtype is torch.bfloat16 with hidden of torch.float32"),
    ]  # fmt: skip
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            tnt.linear_tnt_loss(**{**good, **change})
    assert linear(
        x._replace(ref_hidden=None, ref_weight=None), method="ul+ll", backend=cpu
    ).isfinite()
