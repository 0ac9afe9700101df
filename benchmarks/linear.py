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
from tnt_kernels._linear.chunks import CHUNK_BYTES, CHUNK_BYTES_ELSEWHERE
from tnt_kernels.bench.contenders import naive_tnff
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

    def chunks(self) -> list[Tensor]:
        """The active rows' indices, as the floor takes them: two float32 logits of each fill the library's budget."""
        budget = CHUNK_BYTES.get(self.hidden.device.type, CHUNK_BYTES_ELSEWHERE)
        rows = max(1, budget // (8 * len(self.weight)))
        return list((self.weights != 0).nonzero()[:, 0].split(rows))


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


@torch.no_grad()
def floor(p: LinearProblem) -> tuple[Tensor, ...]:
    """The matmuls of a step over the same chunks, with nothing between them: whatever comes out."""
    chunks = p.chunks()
    most = max(map(len, chunks))
    z, r = (p.hidden.new_empty(most, len(p.weight)) for _ in range(2))
    hidden_gradient, weight_gradient = torch.zeros_like(p.hidden), torch.zeros_like(p.weight)
    for index in chunks:
        n, rows = len(index), p.hidden[index]
        torch.mm(rows, p.weight.t(), out=z[:n])
        torch.mm(p.ref_hidden[index], p.ref_weight.t(), out=r[:n])
        hidden_gradient[index] = torch.mm(z[:n], p.weight)
        weight_gradient.addmm_(z[:n].t(), rows)
    return hidden_gradient, weight_gradient


def _step(loss_function: Callable[[LinearProblem], Tensor]) -> Step:
    return lambda p: torch.autograd.grad(loss_function(p), (p.hidden, p.weight))


def _logits(p: LinearProblem) -> tuple[Tensor, Tensor]:
    return F.linear(p.hidden, p.weight), F.linear(p.ref_hidden, p.ref_weight)


def _unfused(p: LinearProblem) -> Tensor:
    return tnt.tnt_loss(*_logits(p), p.labels, p.weights, inplace=True)


def _naive(p: LinearProblem) -> Tensor:
    return naive_tnff(*_logits(p), p.labels, p.weights)


CONTENDERS = ("floor", "fused", "unfused", "naive", "compiled")
#: Of the sweep over tokens.
SWEEP_CONTENDERS = ("floor", "fused", "naive", "compiled")
MEMORY_CONTENDERS = ("fused", "unfused", "naive", "compiled")


def make_step(contender: str, backend: str | None = None) -> Step:
    """``backend`` is the library's, None the one that it selects."""
    if contender == "floor":
        return floor
    if contender == "fused":
        return _step(lambda p: tnt.linear_tnt_loss(*p, backend=backend))
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
