"""The peers that run on a GPU alone, each as a loss of the shape that ``tnt_kernels.bench.contenders`` has.

They travel as wheels in ``benchmarks/peers/``, which git ignores, because the machine with the GPU may be offline:
``python -m benchmarks.peers --fetch`` downloads them, and tries of each what a CPU can try. They need torch and Triton,
the Liger-Kernel's modules transformers too; what else speculators asks for, its losses do not import. quack's
cross-entropy also needs nvidia-cutlass-dsl and its libraries (92 MB, too much to be carried), apache-tvm-ffi,
torch-c-dlpack-ext and einops.

None of these losses knows a masked target: they get the plain divergence on rows without a removed token, which
is less work than a TNT loss does.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.linear import LinearProblem, LinearSize
from benchmarks.linear import make_problem as make_linear_problem
from tnt_kernels.bench.contenders import Loss
from tnt_kernels.bench.oracle import Truth
from tnt_kernels.bench.problem import Problem, Size, make_problem
from tnt_kernels.bench.steps import Step, measure_step

WHEELS = Path(__file__).parent / "peers"
PACKAGES = ("liger-kernel", "speculators", "quack-kernels")


def fetch(wheels: Path) -> None:
    """Downloads the wheels for the Python that GPU images have."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    options += ["--platform", "manylinux_2_28_x86_64", "--dest", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *PACKAGES], check=True)


def install(wheels: Path, target: Path) -> dict[str, str]:
    """Installs each wheel by itself, without its dependencies and offline; returns why where that failed."""
    failed = {}
    for wheel in sorted(wheels.glob("*.whl")):
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
            "--disable-pip-version-check", "--target", str(target), str(wheel),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            failed[wheel.name] = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
    sys.path.insert(0, str(target))
    return failed


# --- what a peer computes, in float64 -------------------------------------------------------------


def jsd_truth(problem: Problem, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The Jensen-Shannon divergence of policy and reference."""
    logits = problem.original[rows].double().requires_grad_()
    log_p = F.log_softmax(logits, -1)
    log_q = F.log_softmax(problem.ref_logits[rows].double(), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    loss = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
    loss = loss / len(problem.labels)
    (gradients,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradients


# --- the peers ------------------------------------------------------------------------------------


def _liger_kl() -> Loss:
    LigerKLDIVLoss = import_module("liger_kernel.transformers.kl_div").LigerKLDIVLoss
    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda z, r, y, w, ids: divergence(_log_softmax(z), _log_softmax(r))


def _liger_jsd() -> Loss:
    divergence = import_module("liger_kernel.transformers.jsd").LigerJSD()
    return lambda z, r, y, w, ids: divergence(_log_softmax(z), _log_softmax(r))


def _liger_cross_entropy() -> Loss:
    loss = import_module("liger_kernel.transformers.cross_entropy").LigerCrossEntropyLoss()
    # It writes its gradient over its input.
    return lambda z, r, y, w, ids: loss(z, y)


def _log_softmax(logits: Tensor) -> Tensor:
    """Of these kernels' inputs: in float32, as their own benchmarks have it."""
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)


def _speculators(name: str) -> Callable[[], Loss]:
    def load() -> Loss:
        # The package's __init__ modules import a serving stack; the kernels need two files of it.
        for package in ("speculators", "speculators.losses", "speculators.utils"):
            if package not in sys.modules:
                folders = [Path(p, *package.split(".")) for p in sys.path]
                module = ModuleType(package)
                module.__path__ = [str(f) for f in folders if f.is_dir()]
                if not module.__path__:
                    raise ModuleNotFoundError(f"No module named {package!r}")
                sys.modules[package] = module
        loss = getattr(import_module("speculators.losses.fused"), name)
        return lambda z, r, y, w, ids: loss(z[None], r[None]).mean()

    return load


def _torch_cross_entropy() -> Loss:
    return lambda z, r, y, w, ids: F.cross_entropy(z, y)


def _quack_cross_entropy() -> Loss:
    loss = import_module("quack.cross_entropy").cross_entropy
    return lambda z, r, y, w, ids: loss(z, y)


class Peer(NamedTuple):
    name: str
    package: str
    method: str  # the library's that computes the same on rows without a removed token
    work: str
    load: Callable[[], Loss]
    truth: Truth | None = None  # None: that of the method


PEERS = (
    Peer("Liger KLDiv", "liger-kernel", "tnff", "plain KL", _liger_kl),
    Peer("Liger JSD", "liger-kernel", "tnff", "plain JSD", _liger_jsd, jsd_truth),
    Peer("speculators fused KL", "speculators", "tnff", "plain KL", _speculators("fused_kl_div_loss")),
    Peer(
        "speculators fused reverse KL", "speculators", "tnrr", "plain KL",
        _speculators("fused_reverse_kl_div_loss"),
    ),
    Peer("torch cross_entropy", "torch", "ul+ll", "plain LL", _torch_cross_entropy),
    Peer("Liger cross-entropy", "liger-kernel", "ul+ll", "plain LL", _liger_cross_entropy),
    Peer("quack cross_entropy", "quack-kernels", "ul+ll", "plain LL", _quack_cross_entropy),
)  # fmt: skip


# --- the peers of the fused linear loss ------------------------------------------------------------


LinearStep = Callable[[LinearProblem], tuple[Tensor, ...]]


def _liger_linear_jsd() -> LinearStep:
    module = import_module("liger_kernel.transformers.fused_linear_jsd")

    def step(p: LinearProblem) -> tuple[Tensor, ...]:
        loss = module.LigerFusedLinearJSD()(p.hidden, p.weight, p.ref_hidden, p.ref_weight, None)
        return torch.autograd.grad(loss, (p.hidden, p.weight))

    return step


def _liger_linear_cross_entropy() -> LinearStep:
    module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")

    def step(p: LinearProblem) -> tuple[Tensor, ...]:
        loss = module.LigerFusedLinearCrossEntropyLoss()(p.weight, p.hidden, p.labels)
        return torch.autograd.grad(loss, (p.hidden, p.weight))

    return step


def _torch_linear_cross_entropy() -> LinearStep:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)

    def step(p: LinearProblem) -> tuple[Tensor, ...]:
        chunked = {"options": options()} if options is not None else {}
        loss = F.linear_cross_entropy(p.hidden, p.weight, p.labels, **chunked)
        return torch.autograd.grad(loss, (p.hidden, p.weight))

    return step


class LinearPeer(NamedTuple):
    name: str
    package: str
    method: str | None  # the library's that computes the same; None: none does
    work: str
    load: Callable[[], LinearStep]


LINEAR_PEERS = (
    LinearPeer("Liger fused linear JSD", "liger-kernel", None, "plain JSD", _liger_linear_jsd),
    LinearPeer(
        "Liger fused linear cross-entropy", "liger-kernel", "ul+ll", "plain LL",
        _liger_linear_cross_entropy,
    ),
    LinearPeer(
        "torch linear_cross_entropy", "torch", "ul+ll", "plain LL", _torch_linear_cross_entropy
    ),
)  # fmt: skip


# --- which of them are here -----------------------------------------------------------------------


def load_all(
    device: torch.device,
) -> tuple[dict[str, Loss | LinearStep], list[dict[str, Any]]]:
    """The peers that can be imported, by name; and for each whether, in which version, else why not."""
    loaded: dict[str, Any] = {}
    listed = []
    for peer in (*PEERS, *LINEAR_PEERS):
        entry: dict[str, Any] = {"name": peer.name, "package": peer.package, "work": peer.work}
        try:
            entry["version"] = (
                torch.__version__ if peer.package == "torch" else version(peer.package)
            )
            if device.type != "cuda" and peer.package != "torch":
                raise RuntimeError("its kernels run on GPUs alone")
            loaded[peer.name] = peer.load()
        except PackageNotFoundError:
            entry["missing"] = f"{peer.package} is not installed"
        except Exception as error:  # a missing dependency of its, or what its import does here
            entry["missing"] = f"{type(error).__name__}: {error}"[:200]
        listed.append(entry)
    return loaded, listed


def steps(loaded: dict[str, Any], method: str) -> list[Step]:
    """The peers of a method, held to 16-bit rounding of intermediates where the logits are 16-bit."""
    return [
        Step(p.name, method, loaded[p.name], None, 0.05, p.truth, p.work)
        for p in PEERS
        if p.method == method and p.name in loaded
    ]


# --- what a CPU can try ---------------------------------------------------------------------------


def try_all() -> Iterator[tuple[str, str]]:
    """Each peer, and what became of it: imported, called, and, where Triton's interpreter can run it, compared."""
    cpu = torch.device("cpu")
    problem = make_problem(Size(8, 300, "float32"), cpu).all_positive()
    linear_problem = make_linear_problem(LinearSize(8, 16, 300, "float32"), cpu)
    for peer in (*PEERS, *LINEAR_PEERS):
        try:
            loaded: Any = peer.load()
        except Exception as error:
            yield peer.name, f"cannot be imported: {type(error).__name__}: {error}"
            continue
        if isinstance(peer, LinearPeer):
            try:
                loaded(linear_problem)
            except Exception as error:
                yield peer.name, f"runs as far as {type(error).__name__}: {error}"
            else:
                yield peer.name, "runs"
            continue
        step = Step(peer.name, peer.method, loaded, None, 0.05, peer.truth, peer.work)
        record = measure_step(step, problem, 1.0, 0.0)
        failed = record.get("failed")
        yield peer.name, f"runs as far as {failed}" if failed else "gives the right gradient"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--fetch", action="store_true", help="download the wheels first")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="their folder")
    a = parser.parse_args(argv)
    if a.fetch:
        fetch(a.wheels)
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    with tempfile.TemporaryDirectory() as target:
        for wheel, why in install(a.wheels, Path(target)).items():
            print(f"{wheel}: {why}")
        for name, result in try_all():
            print(f"{name}: {result[:160]}", flush=True)


if __name__ == "__main__":
    main()
