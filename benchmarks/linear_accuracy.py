"""Relative errors of ``linear_tnt_loss`` against float64 next to p = q, where training starts, beside what others do.

Near p = q the loss is made of small differences between the two models' logits, so what a matmul rounds off the logits
counts most there. ``benchmarks.accuracy`` starts from logits and cannot show it; this starts from hidden states.

``python -m benchmarks.linear_accuracy`` prints the tables, ``--write`` stores the records in
``results/linear_accuracy.json``, which ``python -m benchmarks.report`` shows. The Liger-Kernel comes from the wheels
that ``python -m benchmarks.peers --fetch`` downloads; on a CPU, Triton's interpreter runs its kernels.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tnt_kernels as tnt
from benchmarks import THREADS, peers
from benchmarks.linear import LinearProblem, LinearSize
from tnt_kernels.bench.cli import environment
from tnt_kernels.bench.contenders import FLOAT16_SCALE, naive_tnff

PATH = Path(__file__).parent / "results" / "linear_accuracy.json"
SIZE = LinearSize(64, 256, 32000)
QUICK_SIZE = LinearSize(8, 64, 2000)
#: Which KL divergences to measure at: nats a row, mean over the rows.
KLS = (0.2, 2e-2, 2e-3, 2e-4, 2e-5, 1e-6)
#: At the quick size a single entry that moves by an ulp of bfloat16 can be worth more than 1e-6.
QUICK_KLS = (0.2, 2e-4)
DTYPES_OF_16_BITS = ("bfloat16", "float16")
DTYPES = ("float32", *DTYPES_OF_16_BITS)
METHODS = ("tnff", "tnrr")
#: Shared: both models have the same output embedding, which is frozen. Apart: two, and the policy's is trained.
HEADS = ("shared", "apart")
#: Standard deviation of the logits, as a language model has it.
SPREAD = 3.0

# --- the inputs ------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """A tensor of the reference model, and what moves it to the policy's."""

    start: Tensor  # in the dtype that is measured
    scale: float  # the standard deviation of its entries
    noise: Tensor  # standard normal, float32
    order: Tensor  # uniform in [0, 1): the lowest entries move first

    def moved(self, distance: float) -> Tensor:
        """The tensor with its entries moved by ``distance * scale`` or so, as a root mean square.

        Rounding makes a step below an ulp none or a whole one, whatever was asked for. So no entry moves by less than
        an ulp, and where that is more than the distance, only a random share of the entries moves.
        """
        ulp = torch.finfo(
            self.start.dtype
        ).eps  # of a number just above 1; relative to any other, at least its ulp
        step = max(distance, ulp)
        x = self.start.float()
        change = (self.noise.abs() * (step * self.scale)).maximum(x.abs() * ulp)
        moves = self.order < (distance / step) ** 2
        return torch.where(moves, x + change.copysign(self.noise), x).to(self.start.dtype)


def make_problem(
    size: LinearSize, heads: str, target: float, device: torch.device | str = "cpu"
) -> LinearProblem:
    """Hidden states and weights whose mean KL(q || p), computed in float64, is near ``target`` nats.

    No token is removed: the loss of a row that has one would hide how near the others are to 0. The numbers are drawn
    on the CPU, so that every device gets the same.

    Raises:
        RuntimeError: no distance of the models was found that gives a KL within a factor of 2.
    """
    rows, hidden, vocab, dtype = size
    generator = torch.Generator().manual_seed(0)

    def origin(n: int, scale: float) -> Origin:
        start, noise = (torch.randn(n, hidden, generator=generator).to(device) for _ in range(2))
        order = torch.rand(n, hidden, generator=generator).to(device)
        return Origin((start * scale).to(getattr(torch, dtype)), scale, noise, order)

    states, embedding = origin(rows, 1.0), origin(vocab, SPREAD / hidden**0.5)
    labels = torch.randint(vocab, (rows,), generator=generator).to(device)
    weights = torch.ones(rows, device=device)
    apart = heads == "apart"

    def problem(distance: float) -> LinearProblem:
        weight = embedding.moved(distance) if apart else embedding.start
        policy = states.moved(distance)
        return LinearProblem(policy, weight, states.start, embedding.start, labels, weights)

    # The KL of two near distributions is half the variance of what their logits differ by.
    distance = math.sqrt(2 * target / (2 if apart else 1)) / SPREAD
    tried: dict[float, float] = {}  # how far off, as the logarithm of a factor, to the distance
    for _ in range(12):
        kl = float(_unfused(_in_float64(problem(distance)), "tnff", "torch"))
        ratio = target / max(kl, target / 16)  # a KL of 0 is a distance at which nothing moves
        tried[abs(math.log(ratio))] = distance
        if min(tried) < 0.1:
            break
        distance *= math.sqrt(ratio)
    if min(tried) > math.log(2):
        raise RuntimeError(f"{size}, heads {heads}: no KL within a factor of 2 of {target:g}")
    found = problem(tried[min(tried)])
    for x in found[:2] if apart else found[:1]:
        x.requires_grad_()
    return found


# --- the contenders --------------------------------------------------------------------------------

#: (problem, method, the library's backend or None for the one that it selects) to the mean loss
Loss = Callable[[LinearProblem, str, "str | None"], Tensor]


def _logits(p: LinearProblem) -> tuple[Tensor, Tensor]:
    return F.linear(p.hidden, p.weight), F.linear(p.ref_hidden, p.ref_weight)


def _fused(p: LinearProblem, method: str, backend: str | None) -> Tensor:
    return tnt.linear_tnt_loss(*p, method=method, backend=backend)


def _fused_in_16_bits(p: LinearProblem, method: str, backend: str | None) -> Tensor:
    keywords: dict[str, Any] = {"logits_dtype": p.hidden.dtype}
    return tnt.linear_tnt_loss(*p, method=method, backend=backend, **keywords)


def _unfused(p: LinearProblem, method: str, backend: str | None) -> Tensor:
    return tnt.tnt_loss(*_logits(p), p.labels, p.weights, method=method, backend=backend)


def _eager(p: LinearProblem, method: str, backend: str | None) -> Tensor:
    return naive_tnff(*_logits(p), p.labels, p.weights)


def _liger(p: LinearProblem, method: str, backend: str | None) -> Tensor:
    """Its JSD with a coefficient of 0 is KL(q || p), with 1 KL(p || q): the methods' where no token is removed."""
    module = import_module("liger_kernel.transformers.fused_linear_jsd")
    if not p.hidden.is_cuda:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter")
        if p.hidden.dtype != torch.float32:
            raise RuntimeError("needs a GPU: there it has float32 logits, on a CPU 16-bit ones")
    divergence = module.LigerFusedLinearJSD(jsd_beta={"tnff": 0.0, "tnrr": 1.0}[method])
    loss: Tensor = divergence(p.hidden, p.weight, p.ref_hidden, p.ref_weight, None)
    return loss


class Contender(NamedTuple):
    """A way from hidden states to the loss, and the cases that it is for."""

    name: str
    loss: Loss
    methods: tuple[str, ...] = METHODS
    heads: tuple[str, ...] = HEADS
    dtypes: tuple[str, ...] = DTYPES
    has_backend: bool = True  # whether it is computed by one of the library's


CONTENDERS = (
    Contender("linear_tnt_loss", _fused),
    Contender(
        "linear_tnt_loss, 16-bit pairs", _fused_in_16_bits,
        heads=("shared",), dtypes=("bfloat16",),
    ),
    Contender("F.linear + tnt_loss", _unfused),
    Contender("eager", _eager, methods=("tnff",), has_backend=False),
    Contender("Liger fused linear JSD", _liger, has_backend=False),
)  # fmt: skip


# --- the errors ------------------------------------------------------------------------------------


class Result(NamedTuple):
    """The mean loss, and the gradients of the hidden states and, heads apart, of the weight."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def _in_float64(p: LinearProblem) -> LinearProblem:
    names = ("hidden", "weight", "ref_hidden", "ref_weight")
    tensors = {name: getattr(p, name) for name in names}
    wide = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in tensors.items()}
    return p._replace(**wide)


def _result(p: LinearProblem, loss: Tensor) -> Result:
    """In float64, with the gradients of a factor on the loss, without which float16 would lose them to underflow."""
    scale = FLOAT16_SCALE if p.hidden.dtype == torch.float16 else 1.0
    trained = [x for x in p[:2] if x.requires_grad]
    gradients = torch.autograd.grad(loss, trained, torch.full_like(loss, scale))
    return Result(loss.detach().double(), tuple(g.double() / scale for g in gradients))


def truth(p: LinearProblem, method: str) -> Result:
    """Of these very inputs, computed in float64 throughout."""
    wide = _in_float64(p)
    return _result(wide, _unfused(wide, method, "torch"))


def errors(found: Result, expected: Result) -> dict[str, float]:
    """Of the loss, and of the gradients in the Euclidean norm, relative to the truth.

    Raises:
        ArithmeticError: one is not finite.
    """
    relative = {"loss_error": _digits(abs(float(found.loss / expected.loss) - 1))}
    names = ("hidden_gradient_error", "weight_gradient_error")
    for name, x, exact in zip(names, found.gradients, expected.gradients, strict=False):
        relative[name] = _digits(float((x - exact).norm() / exact.norm()))
    if not all(map(math.isfinite, relative.values())):
        raise ArithmeticError(f"not finite: {relative}")
    return relative


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def measure(
    size: LinearSize = SIZE,
    device: torch.device | str = "cpu",
    *,
    dtypes: Sequence[str] = DTYPES,
    methods: Sequence[str] = METHODS,
    heads: Sequence[str] = HEADS,
    kls: Sequence[float] = KLS,
    contenders: Sequence[Contender] = CONTENDERS,
    backend: str | None = None,
) -> list[dict[str, Any]]:
    """One record a contender and case; where a contender cannot run, ``failed`` says why and there are no errors.

    Args:
        size: its dtype does not count.
        kls: targets; a record's ``kl`` is the case's own divergence in nats, that of its method, in float64.
        backend: the library's; None: the one that it selects.
    """
    records = []
    for head in heads:
        for dtype in dtypes:
            for target in kls:
                problem = make_problem(size._replace(dtype=dtype), head, target, device)
                for method in methods:
                    expected = truth(problem, method)
                    case = {
                        "heads": head,
                        "method": method,
                        **size._replace(dtype=dtype)._asdict(),
                        "target_kl": target,
                        "kl": _digits(float(expected.loss)),
                    }
                    for c in contenders:
                        if method in c.methods and head in c.heads and dtype in c.dtypes:
                            records.append(
                                {
                                    "contender": c.name,
                                    "backend": backend if c.has_backend else None,
                                    **case,
                                }
                                | _measured(c, problem, method, backend, expected)
                            )
    return records


def _measured(
    contender: Contender, p: LinearProblem, method: str, backend: str | None, expected: Result
) -> dict[str, Any]:
    try:
        return errors(_result(p, contender.loss(p, method, backend)), expected)
    except Exception as error:  # whatever a peer may raise: what it lacks, a compiler's, its own
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0][:200]}"}


# --- the command -----------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_accuracy")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--wheels", type=Path, default=peers.WHEELS, help="folder of the peers'")
    parser.add_argument("--write", action="store_true", help=f"into {PATH.name}")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny size, to see that all runs; is not written"
    )
    a = parser.parse_args(argv)
    if a.write and a.quick:
        parser.error("--write: a quick run's figures mean nothing")
    if a.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    torch.set_num_threads(THREADS)
    # They need pandas, which a measurement does not.
    from benchmarks.report import linear_accuracy_table
    from benchmarks.results import commit
    from benchmarks.sass import lines

    with tempfile.TemporaryDirectory() as folder:
        for wheel, why in peers.install(a.wheels, Path(folder)).items():
            print(f"{wheel}: {why}")
        if a.quick:
            records = measure(QUICK_SIZE, a.device, kls=QUICK_KLS)
        else:
            records = measure(device=a.device)
        liger = _version("liger-kernel")
    for method in METHODS:
        print(linear_accuracy_table(records, method), end="\n\n")
    if a.write:
        where = environment(a.device)
        where["versions"]["liger-kernel"] = liger
        PATH.write_text(lines({**where, "commit": commit(), "records": records}))


if __name__ == "__main__":
    main()
