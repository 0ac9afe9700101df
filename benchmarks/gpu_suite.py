"""Everything on one GPU: ``python -m benchmarks.gpu_suite --out DIR``, offline, in under nine minutes.

Writes ``gpu.json`` and ``gpu.log`` there, and with the options a log of each. Copy and triad bandwidth come first, then
the cases, most important first: what the time does not suffice for is listed in the JSON as left out. Every contender's
gradient is checked against float64 before it is timed. ``--tiny --device cpu`` runs all of it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import accuracy, linear, peers
from benchmarks.report import ROOT
from tnt_kernels.backends import BACKENDS
from tnt_kernels.bench.cli import environment
from tnt_kernels.bench.contenders import make_loss, model_output
from tnt_kernels.bench.measure import bandwidths, time_calls
from tnt_kernels.bench.memory import can_measure, peak_beyond
from tnt_kernels.bench.problem import Negatives, Problem, Size, make_problem
from tnt_kernels.bench.steps import Step, library_backends, library_step, measure_step

log = logging.getLogger("gpu_suite")

MAIN = Size(8192, 128256, "bfloat16")
VOCABULARIES = (32000, 151936, 262144, 50257)
ROWS = (64, 256, 1024, 4096, 16384)
LINEAR = linear.LinearSize(8192, 4096, 128256, "bfloat16")
LINEAR_ROWS = (1024, 2048, 4096, 16384)
LIBRARY = ("in place", "fresh", "forward")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


class Case(NamedTuple):
    """A problem, and who is measured on it."""

    size: Size
    method: str = "tnff"
    library: Sequence[str] = ("in place", "fresh")
    others: Sequence[str] = ()  # of tnt_kernels.bench.contenders
    peers: bool = False
    active_share: float = 1.0
    negatives: Negatives = "none"


CASES = (
    Case(MAIN, "tnff", LIBRARY, ("naive", "naive, narrow", "naive forward", "compiled"), True),
    Case(MAIN, "tnrr", LIBRARY, ("naive",), True),
    Case(MAIN, "ul+ll", LIBRARY, ("naive", "compiled"), True),
    Case(MAIN, "tnrf", LIBRARY, ("naive", "compiled")),
    Case(MAIN, active_share=0.1),
    Case(MAIN, active_share=0.5),
    Case(MAIN, negatives="64 a row"),
    Case(MAIN, negatives="4000 shared"),
)
SWEEPS = (
    *(
        Case(MAIN._replace(vocab=v), library=LIBRARY, others=("naive",), peers=True)
        for v in VOCABULARIES
    ),
    Case(MAIN._replace(dtype="float32", rows=4096), others=("naive",), peers=True),
    Case(MAIN._replace(dtype="float16", rows=4096), others=("naive",), peers=True),
    *(Case(MAIN._replace(rows=n), others=("naive",)) for n in ROWS),
    Case(Size(64, 32000, "bfloat16"), library=LIBRARY, others=("naive",)),
)
#: Compiling takes the longest, so it comes last.
LATE = tuple(
    Case(MAIN._replace(vocab=v), library=(), others=("compiled",)) for v in VOCABULARIES[:3]
)


class Suite:
    def __init__(self, device: torch.device, tiny: bool, budget: float, seconds: float) -> None:
        self.device, self.tiny, self.seconds = device, tiny, seconds
        self.end = time.monotonic() + budget
        self.loaded: dict[str, Any] = {}
        self.results: dict[str, Any] = {
            "quick": tiny, "bandwidth": [], "cases": [], "left_out": [], "peers": [],
            "linear": [], "accuracy": [], "overhead_us": {},
        }  # fmt: skip
        self._problem: tuple[Size, Problem, float] | None = None

    def over(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return False
        self.results["left_out"].append(what)
        log.info("left out, the time is over: %s", what)
        return True

    def size(self, size: Size) -> Size:
        return Size(min(size.rows, 16), size.vocab // 20, size.dtype) if self.tiny else size

    def problem(self, size: Size) -> tuple[Problem, float]:
        """The inputs at a size, and the bandwidth there; the last ones are kept."""
        if self._problem is None or self._problem[0] != size:
            self._problem = None  # free it first
            torch._dynamo.reset()
            problem = make_problem(size, self.device)
            speeds = bandwidths(problem, self.seconds / 2)
            for b in speeds:
                self.results["bandwidth"].append(
                    {
                        **size._asdict(),
                        "variant": b.variant,
                        "gb_per_s": b.gb_per_s,
                        **b.timing._asdict(),
                    }
                )
                log.info("%s: %s %.4g GB/s", size, b.variant, b.gb_per_s)
            self._problem = size, problem, max(b.gb_per_s for b in speeds)
        return self._problem[1:]

    def run_case(self, case: Case) -> None:
        if self.over(_describe(case)):
            return
        size = self.size(case.size)
        problem, gb_per_s = self.problem(size)
        if case.active_share < 1:
            problem = problem.with_active_share(case.active_share)
        if case.negatives != "none":
            ids = problem.with_negatives(case.negatives)
            problem = ids
        for step in self.steps(case, problem):
            if self.over(f"{_describe(case)}: {step.contender}"):
                continue
            # A loss without a masked target takes rows without a removed token.
            mine = problem.all_positive() if step.work else problem
            record = measure_step(step, mine, gb_per_s, self.seconds, case.negatives)
            self.results["cases"].append(record)
            log.info("%s: %s", _describe(case._replace(size=size)), _summary(record))

    def steps(self, case: Case, problem: Problem) -> Iterator[Step]:
        for backend in library_backends(problem.logits):
            for contender in case.library:
                yield library_step(contender, case.method, backend)
        for contender in case.others:
            yield library_step(contender, case.method)
        if case.peers:
            yield from peers.steps(self.loaded, case.method)

    def run_linear(
        self, rows: int, contenders: Sequence[str], share: float = 1.0, with_peers: bool = True
    ) -> None:
        """``linear_tnt_loss`` against its matmuls, and what there is besides."""
        if self.over(f"linear, {rows} rows, {share:.0%} active"):
            return
        size = LINEAR._replace(rows=rows)
        size = size._replace(rows=min(rows, 48), hidden=32, vocab=2000) if self.tiny else size
        self._problem = None
        torch._dynamo.reset()
        problem = linear.make_problem(size, self.device).with_active_share(share)
        backends = library_backends(torch.empty(1, 1, device=self.device))
        todo: list[tuple[str, str | None, str, Callable[[], Any]]] = []
        for name in contenders:
            for backend in backends if name == "fused" else [None]:
                todo.append((name, backend, "", lambda n=name, b=backend: linear.make_step(n, b)))
        if with_peers and share == 1:
            for peer in peers.LINEAR_PEERS:
                if peer.name in self.loaded:
                    todo.append((peer.name, None, peer.work, lambda n=peer.name: self.loaded[n]))
        for name, backend, work, make in todo:
            if self.over(f"linear, {rows} rows: {name}"):
                continue
            record = {
                "contender": name, "backend": backend, "work": work, "active_share": share,
                **size._asdict(),
            }  # fmt: skip
            try:
                record |= self.measure_linear(make(), name, problem)
            except Exception as error:
                record["failed"] = f"{type(error).__name__}: {error}"[:200]
            self.results["linear"].append(record)
            log.info("linear %s, %.0f%% active: %s", size, 100 * share, _summary(record))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def measure_linear(
        self, step: linear.Step, name: str, problem: linear.LinearProblem
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        gradients = step(problem)
        methods = {p.name: p.method for p in peers.LINEAR_PEERS}
        method = methods.get(name, "tnff")
        if name != "floor" and method is not None:
            # Of a peer's plain LL, too: the library's, on rows of weight 1.
            ones = problem._replace(weights=torch.ones_like(problem.weights))
            found["gradient_error"] = linear.check(
                gradients, ones if name in methods else problem, method
            )
        elif method is None:
            found["gradient_error"] = _check_linear_jsd(gradients, problem)
        bytes_ = sum(g.numel() * g.element_size() for g in gradients)
        del gradients
        if can_measure(self.device):
            found["bytes_beyond_gradients"] = (
                peak_beyond(lambda: step(problem), self.device) - bytes_
            )
        timing = time_calls(lambda: step(problem), self.device, seconds=self.seconds)
        return {**found, **timing._asdict()}

    def run_accuracy(self) -> None:
        if self.over("accuracy"):
            return
        size = Size(8, 2000, "float32") if self.tiny else accuracy.SIZE
        logits = torch.empty(1, 1, device=self.device)
        steps = [
            step
            for method in ("tnff", "tnrr")
            for step in (
                *(library_step("fresh", method, b) for b in library_backends(logits)),
                *(library_step(c, method) for c in ("naive", "naive, narrow")),
                *peers.steps(self.loaded, method),
            )
        ]
        self.results["accuracy"] = accuracy.measure(size, self.device, steps=steps)
        log.info("accuracy: %d figures", len(self.results["accuracy"]))

    def run_overhead(self) -> None:
        """What a call costs the host: forward and backward of one row of eight, launches included, waited for once."""
        if self.over("overhead"):
            return
        logits, reference = (torch.randn(1, 8, device=self.device) for _ in range(2))
        labels = torch.tensor([3], device=self.device)
        weights = torch.tensor([-1.0], device=self.device)
        calls = [
            (f"{c}, {b}", make_loss(c, "tnff", b))
            for b in library_backends(logits)
            for c in LIBRARY[:2]
        ]
        for name, loss in (*calls, ("naive", make_loss("naive", "tnff"))):

            def call(loss: Any = loss) -> None:
                for _ in range(100):
                    loss(model_output(logits), reference, labels, weights, None).backward()

            call()
            timing = time_calls(call, torch.device("cpu"), seconds=0.2, most=20)
            self.results["overhead_us"][name] = timing.ms_median * 10
            log.info("call, %s: %.3g us", name, timing.ms_median * 10)
            if self.device.type == "cuda":
                torch.cuda.synchronize()

    def run(self) -> None:
        for case in CASES:
            self.run_case(case)
        everyone = ("floor", "fused", "unfused", "naive", "compiled")
        self.run_linear(LINEAR.rows, everyone)
        self.run_linear(LINEAR.rows, ("floor", "fused"), 0.25)
        self.run_overhead()
        self.run_accuracy()
        for case in SWEEPS:
            self.run_case(case)
        for rows in LINEAR_ROWS:
            self.run_linear(rows, ("floor", "fused", "naive"))
        for case in LATE:
            self.run_case(case)
        for rows in LINEAR_ROWS:
            self.run_linear(rows, ("compiled",), with_peers=False)


def _check_linear_jsd(gradients: Sequence[torch.Tensor], p: linear.LinearProblem) -> float:
    some = torch.arange(4, device=p.labels.device)
    hidden = p.hidden[some].detach().double().requires_grad_()
    logits = hidden @ p.weight.detach().double().T
    ref_logits = p.ref_hidden[some].double() @ p.ref_weight.double().T
    size = Size(4, len(p.weight), "float64")
    rows = Problem(size, logits.detach(), logits, ref_logits, p.labels, p.weights)
    _, upstream = peers.jsd_truth(rows, some)
    (expected,) = torch.autograd.grad(logits, hidden, upstream)
    error = float((gradients[0][some] - expected).norm() / expected.norm())
    assert error < 0.1, f"gradient off by {error}"
    return error


def _describe(case: Case) -> str:
    also = "" if case.active_share == 1 else f", {case.active_share:.0%} active"
    also += "" if case.negatives == "none" else f", {case.negatives} negative ids"
    return f"{case.method} {case.size}{also}"


def _summary(record: dict[str, Any]) -> str:
    name = " ".join(filter(None, (record["backend"], record["contender"], record["work"])))
    if "failed" in record:
        return f"{name}: {record['failed']}"
    floor = (
        f", {record['fraction_of_floor']:.3f} of the floor" if "fraction_of_floor" in record else ""
    )
    error = f", error {record['gradient_error']:.1e}" if "gradient_error" in record else ""
    return f"{name}: {record['ms_min']:.4g} ms{floor}{error}"


def _run(command: Sequence[str], path: Path, seconds: float, **environment: str) -> str:
    """Runs a tool with its output in a file; returns how it ended."""
    log.info("%s", " ".join(command))
    with path.open("w") as file:
        try:
            result = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=file,
                stderr=subprocess.STDOUT, timeout=seconds,
            )  # fmt: skip
            ended = f"exit status {result.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            ended = f"{type(error).__name__}: {error}"
    log.info("%s: %s", path.name, ended)
    return ended


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--budget", type=float, default=480.0, help="seconds; nothing is begun after them"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="that one contender is timed for"
    )
    parser.add_argument(
        "--wheels", type=Path, default=peers.WHEELS, help="folder of the peers' wheels"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--tests", action="store_true", help="first the tests that need a GPU")
    parser.add_argument(
        "--sanitize", action="store_true", help="first compute-sanitizer, on tiny shapes"
    )
    parser.add_argument(
        "--ncu", action="store_true", help="first Nsight Compute, on one step in place"
    )
    a = parser.parse_args(argv)
    if a.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: no GPU that this torch can use; --device cpu --tiny tries the suite without one"
        )
    a.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    handlers: list[logging.Handler] = [
        logging.StreamHandler(sys.stdout),
        logging.FileHandler(a.out / "gpu.log", "w"),
    ]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(relativeCreated)8.0f %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

    ended: dict[str, str] = {}
    tiny = [sys.executable, "-m", "tnt_kernels", "bench", "--tiny", "--device", str(a.device)]
    if a.tests:
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
        ended["tests"] = _run(tests, a.out / "tests.log", a.budget / 2)
    if a.sanitize:
        small = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-k",
            "small",
            "tests/test_cuda.py",
        ]
        checks = [(tool, "cuda", small) for tool in SANITIZERS]
        checks += [(tool, "bench", tiny) for tool in SANITIZERS[:2]]
        for tool, what, command in checks:
            name = f"{what}-{tool}"
            ended[name] = _run(
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *command],
                a.out / f"{name}.log", a.budget / 8,
                # each tensor an allocation of its own, or nothing is out of bounds
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )  # fmt: skip
    if a.ncu:
        command = ["ncu", "--clock-control", "none", "--set", "detailed", *tiny]
        ended["ncu"] = _run(command, a.out / "ncu.log", a.budget / 4)

    suite = Suite(
        a.device, a.tiny, a.budget - (time.monotonic() - begun), 0.01 if a.tiny else a.seconds
    )
    results = suite.results
    with tempfile.TemporaryDirectory() as folder:
        failed = peers.install(a.wheels, Path(folder))
        for wheel, why in failed.items():
            log.info("%s: %s", wheel, why)
        suite.loaded, results["peers"] = peers.load_all(a.device)
        for peer in results["peers"]:
            log.info("%s: %s", peer["name"], peer.get("missing") or f"version {peer['version']}")
        for name, backend in BACKENDS.items():
            log.info(
                "backend %s: %s",
                name,
                backend.why_not(torch.empty(1, 1, device=a.device)) or "measured",
            )
        try:
            suite.run()
        finally:
            results |= {**environment(a.device), "commit": _commit(), "checks": ended}
            results["wheels_failed"] = failed
            results["seconds"] = round(time.monotonic() - begun, 1)
            (a.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            log.info("wrote %s after %.0f s", a.out / "gpu.json", results["seconds"])
            for handler in handlers:
                log.removeHandler(handler)
                handler.close()


if __name__ == "__main__":
    main()
