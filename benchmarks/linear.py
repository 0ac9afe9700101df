"""``linear_tnt_loss`` against its matmuls alone, and against what makes the logits first.

``python -m benchmarks.linear CONTENDER ROWS`` prints the peak memory of one step in a process of its own, as
``tnt_kernels.bench.memory`` measures it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tnt_kernels as tnt
from benchmarks import THREADS
from tnt_kernels._linear.sizes import budget
from tnt_kernels.bench.contenders import naive_tnff
from tnt_kernels.bench.measure import time_calls
from tnt_kernels.bench.memory import KNOWN, in_process, peak_beyond


class LinearSize(NamedTuple):
    rows: int
    hidden: int
    vocab: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.rows}x{self.hidden}x{self.vocab}-{self.dtype}"


SIZE = LinearSize(512, 512, 32000)
SIZES = (SIZE, SIZE._replace(dtype="bfloat16"))
QUICK_SIZES = (LinearSize(16, 32, 5000), LinearSize(16, 32, 5000, "bfloat16"))
#: Over the tokens of a batch. At a vocabulary of 128256, 16k tokens take a CPU minutes a step, hence this smaller head.
SWEEP = tuple(LinearSize(n, 256, 8192) for n in (1024, 4096, 16384))
QUICK_SWEEP = (LinearSize(24, 16, 3000),)
SPARSE = 0.25  # active share where "25 % of the rows" is measured


class LinearProblem(NamedTuple):
    """The inputs of one step."""

    hidden: Tensor  # (N, H), requires grad
    weight: Tensor  # (V, H), requires grad
    ref_hidden: Tensor  # (N, H)
    ref_weight: Tensor  # (V, H)
    labels: Tensor  # (N,)
    weights: Tensor  # (N,): -1, 0 or 1

    def with_active_share(self, share: float) -> LinearProblem:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(1))
        weights = self.weights.clone()
        weights[order[round(share * len(order)) :].to(weights.device)] = 0
        return self._replace(weights=weights)

    def with_shared_head(self) -> LinearProblem:
        """Both models with the policy's weight, which is trained all the same: as many matmuls."""
        return self._replace(ref_weight=self.weight.detach())


def make_problem(size: LinearSize, device: torch.device | str = "cpu") -> LinearProblem:
    """Logits of a standard deviation of 3, the policy a little away from the reference, one row in four pushed down."""
    rows, hidden, vocab, dtype = size
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    spread = 3 / hidden**0.5
    ref_hidden, ref_weight = normal(rows, hidden), normal(vocab, hidden).mul_(spread)
    weight = normal(vocab, hidden).mul_(0.1 * spread).add_(ref_weight)
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    pushed = torch.rand(rows, generator=generator, device=device) < 0.25
    policy = ref_hidden + 0.05 * normal(rows, hidden)
    tensors = [x.to(getattr(torch, dtype)) for x in (policy, weight, ref_hidden, ref_weight)]
    for x in tensors[:2]:
        x.requires_grad_()
    return LinearProblem(*tensors, labels, torch.where(pushed, -1.0, 1.0))


Step = Callable[[LinearProblem], tuple[Tensor, ...]]


class Chunking(NamedTuple):
    """In rows."""

    policy: int  # whose logits are multiplied out at once, and back
    reference: int  # whose logits are

    def __str__(self) -> str:
        return f"{self.policy} rows at a time, {self.reference} of the reference"


def chunkings(p: LinearProblem) -> list[Chunking]:
    """Ways to go through the active rows with logits that the memory of ``linear_tnt_loss`` holds."""
    rows, width = int((p.weights != 0).sum()), len(p.weight) * p.weight.element_size()
    # The library may have a float32 sum of a 16-bit weight's gradient, or other things in its place.
    allowed = budget(p.hidden, len(p.weight)) + (
        4 * p.weight.numel() if p.weight.element_size() == 2 else 0
    )
    tile = 16 if p.weight.is_cpu else 128
    found = []
    for parts in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128):
        policy = -(-rows // parts) if parts == 1 else -(-rows // parts // tile) * tile
        for share in (1, 2, 4, 8):
            reference = -(-policy // share)
            if (policy + reference) * width <= allowed:
                found.append(Chunking(policy, reference))
                break
        if len(found) == 5:
            break
    least = max(1, min(rows, allowed // (2 * width)))
    return found or [Chunking(least, least)]


@torch.no_grad()
def multiply(p: LinearProblem, chunking: Chunking) -> tuple[Tensor, ...]:
    """The matmuls of a step with nothing between them: whatever comes out."""
    active = (p.weights != 0).nonzero()[:, 0]
    whole = len(active) == len(p.weights)
    hidden, ref_hidden = (x if whole else x[active] for x in (p.hidden, p.ref_hidden))
    z, r = (p.hidden.new_empty(n, len(p.weight)) for n in chunking)
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(p.weight)
    for begin in range(0, len(hidden), chunking.policy):
        rows = hidden[begin : begin + chunking.policy]
        n = len(rows)
        torch.mm(rows, p.weight.t(), out=z[:n])
        for part in ref_hidden[begin : begin + n].split(chunking.reference):
            torch.mm(part, p.ref_weight.t(), out=r[: len(part)])
        torch.mm(z[:n], p.weight, out=hidden_gradient[begin : begin + n])
        weight_gradient.addmm_(z[:n].t(), rows, beta=float(begin > 0))
    if not whole:
        hidden_gradient = torch.zeros_like(p.hidden).index_copy_(0, active, hidden_gradient)
    return hidden_gradient, weight_gradient


class Floor:
    """The fastest of the ways to multiply, found by trying, for a problem."""

    def __init__(self) -> None:
        self._known: tuple[LinearProblem, Chunking] | None = None

    def chunking(self, p: LinearProblem) -> Chunking:
        if self._known is None or self._known[0] is not p:
            some = chunkings(p)

            def ms(chunking: Chunking) -> float:
                timing = time_calls(
                    lambda: multiply(p, chunking), p.hidden.device, seconds=0.0, least=2
                )
                return timing.ms_min

            self._known = p, some[0] if len(some) == 1 else min(some, key=ms)
        return self._known[1]

    def __call__(self, p: LinearProblem) -> tuple[Tensor, ...]:
        return multiply(p, self.chunking(p))


def _step(loss_function: Callable[[LinearProblem], Tensor]) -> Step:
    return lambda p: torch.autograd.grad(loss_function(p), (p.hidden, p.weight))


def _logits(p: LinearProblem) -> tuple[Tensor, Tensor]:
    return F.linear(p.hidden, p.weight), F.linear(p.ref_hidden, p.ref_weight)


def _unfused(p: LinearProblem) -> Tensor:
    return tnt.tnt_loss(*_logits(p), p.labels, p.weights, inplace=True)


def _naive(p: LinearProblem) -> Tensor:
    return naive_tnff(*_logits(p), p.labels, p.weights)


#: The library's: heads apart; one head of both models; the same with pairs of logits in 16 bits.
FUSED = ("fused", "shared", "pairs")
CONTENDERS = ("floor", *FUSED, "unfused", "naive", "compiled")
#: Of the sweep over tokens.
SWEEP_CONTENDERS = ("floor", "fused", "naive", "compiled")
MEMORY_CONTENDERS = ("fused", "unfused", "naive", "compiled")


def posed(p: LinearProblem, contender: str) -> LinearProblem:
    """The problem as a contender computes it."""
    return p.with_shared_head() if contender in ("shared", "pairs") else p


def make_step(contender: str, backend: str | None = None) -> Step:
    """``backend`` is the library's, None the one that it selects."""
    if contender == "floor":
        return Floor()
    if contender in FUSED:
        logits_dtype = torch.bfloat16 if contender == "pairs" else None

        def loss(p: LinearProblem) -> Tensor:
            return tnt.linear_tnt_loss(
                *posed(p, contender), logits_dtype=logits_dtype, backend=backend
            )

        return _step(loss)
    if contender == "compiled":
        return _step(torch.compile(_naive, fullgraph=True, dynamic=False))
    return _step({"unfused": _unfused, "naive": _naive}[contender])


#: Of the norm. Logits that a matmul has rounded to bfloat16 are off by up to 0.03, which is a tenth of what the two
#: models differ by; another loss is off by more than half.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def check(gradients: tuple[Tensor, ...], p: LinearProblem, method: str = "tnff") -> float:
    """Relative error of the gradient of a few active hidden states, against the reference in float64.

    Raises:
        AssertionError: it is above ``TOLERANCE``.
    """
    some = (p.weights != 0).nonzero()[:4, 0]
    rows = [x[some].detach() for x in (p.hidden, p.ref_hidden, p.labels, p.weights)]
    hidden, ref_hidden = (x.double() for x in rows[:2])
    weight, ref_weight = p.weight.detach().double(), p.ref_weight.double()
    hidden.requires_grad_()
    small = LinearProblem(hidden, weight, ref_hidden, ref_weight, *rows[2:])
    loss = tnt.tnt_loss(
        *_logits(small), rows[2], rows[3], method=method, reduction="sum", backend="torch"
    )
    (expected,) = torch.autograd.grad(loss / (p.weights != 0).sum(), hidden)
    error = float((gradients[0][some] - expected).norm() / expected.norm())
    assert error < TOLERANCE[p.hidden.dtype], f"gradient off by {error}"
    return error


# --- memory ----------------------------------------------------------------------------------------


def measure_memory(contender: str, size: LinearSize) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    step = make_step(contender)
    # Matmuls of some size, so that the packing buffers which MKL keeps for a process (22 MiB on one machine) are there.
    step(make_problem(size if contender == "compiled" else size._replace(rows=min(size.rows, 256))))
    problem = make_problem(size)
    known = peak_beyond(lambda: torch.empty(KNOWN, dtype=torch.uint8).fill_(1))
    return {
        "contender": contender,
        **size._asdict(),
        "bytes_beyond_inputs": peak_beyond(lambda: step(problem)),
        "gradient_bytes": sum(x.numel() * x.element_size() for x in problem[:2]),
        "known_bytes": KNOWN,
        "known_bytes_measured": known,
    }


def measure_memory_in_process(contender: str, size: LinearSize) -> dict[str, Any]:
    return in_process("benchmarks.linear", contender, *size, cwd=Path(__file__).parent.parent)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("rows", type=int, nargs="?", default=SIZE.rows)
    parser.add_argument("hidden", type=int, nargs="?", default=SIZE.hidden)
    parser.add_argument("vocab", type=int, nargs="?", default=SIZE.vocab)
    parser.add_argument("dtype", nargs="?", default=SIZE.dtype)
    a = parser.parse_args()
    print(json.dumps(measure_memory(a.contender, LinearSize(a.rows, a.hidden, a.vocab, a.dtype))))


if __name__ == "__main__":
    main()
