"""What runs in the processes of ``benchmarks.gpu_suite``: each measures, and prints a JSON line a record.

``python -m benchmarks.gpu_stages speed --backend triton`` runs one by itself.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import tnt_kernels as tnt
from benchmarks import accuracy, linear, linear_accuracy, peers
from tnt_kernels.backends import BACKENDS, triton
from tnt_kernels.backends.triton.config import RowConfig, row_config, table_key
from tnt_kernels.bench.contenders import make_loss, model_output, training_step
from tnt_kernels.bench.measure import bandwidths, time_calls
from tnt_kernels.bench.memory import can_measure, peak_beyond
from tnt_kernels.bench.oracle import TOLERANCE
from tnt_kernels.bench.problem import Negatives, Problem, Size, make_problem
from tnt_kernels.bench.steps import Step, library_step, measure_step

MAIN = Size(8192, 128256, "bfloat16")
VOCABULARIES = (32000, 151936, 262144, 50257)
ROWS = (64, 256, 1024, 4096, 16384)
LINEAR = linear.LinearSize(8192, 4096, 128256, "bfloat16")
#: Llama-3, Gemma, Qwen and GPT-2 have heads of these shapes.
LINEAR_SIZES = (
    *(LINEAR._replace(rows=n) for n in (1024, 2048, 4096, 16384)),
    linear.LinearSize(8192, 2304, 262144, "bfloat16"),
    linear.LinearSize(8192, 3584, 152064, "bfloat16"),
    linear.LinearSize(8192, 768, 50257, "bfloat16"),
)
LIBRARY = ("in place", "fresh", "forward")
SMOKE_VOCABULARIES = (17, 5000, 60001, 128256)
SMOKE_DTYPES = ("bfloat16", "float32")
SMOKE_METHODS = ("tnff", "tnrr", "ul+ll")
PROFILED = ("tnff", "tnrr", "tnff forward")
PROFILED_SIZE = MAIN._replace(rows=4096)
#: Distances between the models' logits at which the speed is taken: next to each other, and far.
DISTANCES = (0.1, 0.3, 1.0, 3.0)


class Case(NamedTuple):
    """A problem, and who is measured on it."""

    size: Size
    method: str = "tnff"
    library: Sequence[str] = ("in place", "fresh")
    others: Sequence[str] = ()  # of tnt_kernels.bench.contenders
    peers: bool = False
    active_share: float = 1.0
    negatives: Negatives = "none"


SPEED = (Case(MAIN, "tnff", ("in place", "forward")), Case(MAIN, "tnrr", ("in place", "forward")))
TABLE = (
    Case(MAIN, "tnff", LIBRARY, ("naive", "naive, narrow", "naive forward", "compiled"), True),
    Case(MAIN, "tnrr", LIBRARY, ("naive",), True),
    Case(MAIN, "ul+ll", LIBRARY, ("naive",), True),
    Case(MAIN, "tnrf", LIBRARY, ("naive",)),
    Case(MAIN, active_share=0.1),
    Case(MAIN, active_share=0.5),
    Case(MAIN, negatives="64 a row"),
    Case(MAIN, negatives="4000 shared"),
    *(Case(MAIN._replace(vocab=v), library=LIBRARY) for v in VOCABULARIES),
)
SWEEPS = (
    *(
        Case(MAIN._replace(vocab=v), library=(), others=("naive",), peers=True)
        for v in VOCABULARIES
    ),
    Case(MAIN._replace(dtype="float32", rows=4096), others=("naive",), peers=True),
    Case(MAIN._replace(dtype="float16", rows=4096), others=("naive",), peers=True),
    *(Case(MAIN._replace(rows=n), others=("naive",)) for n in ROWS),
    Case(Size(64, 32000, "bfloat16"), library=LIBRARY, others=("naive",)),
)
#: Compiling takes the longest, so it comes last.
COMPILED = (
    Case(MAIN, "ul+ll", (), ("compiled",)),
    Case(MAIN, "tnrf", (), ("compiled",)),
    *(Case(MAIN._replace(vocab=v), library=(), others=("compiled",)) for v in VOCABULARIES[:3]),
)


def _variants() -> tuple[tuple[str, Any], ...]:
    """What the stages up to the table compile with Triton, a part for a process."""
    smoke = [("smoke", (m, d)) for m in SMOKE_METHODS for d in SMOKE_DTYPES]
    # Whatever else there is in the table launches the same kernels.
    sizes = (MAIN, *(MAIN._replace(vocab=vocab) for vocab in (32000, 50257)))
    cases = [("case", c) for c in TABLE if c.size in sizes and c.active_share == 1]
    # Of the fused linear loss V counts alone.
    even, odd = (x._replace(rows=16, hidden=16) for x in (LINEAR, LINEAR_SIZES[-1]))
    fused = [("linear", (name, size)) for size in (even, odd) for name in linear.FUSED]
    return (*smoke, *cases, *fused)


WARM = _variants()


class Stages:
    """The workloads, one of which a process runs."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.device, self.tiny, self.seconds = a.device, a.tiny, 0.01 if a.tiny else a.seconds
        self.backend: str | None = a.backend
        self.a = a
        self.loaded: dict[str, Any] = {}
        self.done = _read_records(a.done) if a.done else []
        self._problem: tuple[Size, Problem, float] | None = None
        self.lock = threading.Lock()

    @property
    def kernel_backend(self) -> str:
        """On a device without the backend, where the stages are only tried, another."""
        assert self.backend is not None
        probe = torch.empty(1, 1, device=self.device)
        return "torch" if self.tiny and BACKENDS[self.backend].why_not(probe) else self.backend

    def emit(self, kind: str, **record: Any) -> None:
        self.done.append({"kind": kind, **record})
        print(json.dumps(self.done[-1]), flush=True)

    def is_done(self, kind: str, **key: Any) -> bool:
        """Whether this stage, or an earlier one or run, has this figure."""
        return any(
            r["kind"] == kind and "failed" not in r and all(r.get(k) == v for k, v in key.items())
            for r in self.done
        )

    # --- what is measured on the logits ---

    def size(self, size: Size) -> Size:
        return Size(min(size.rows, 8), size.vocab // 20, size.dtype) if self.tiny else size

    def problem(self, size: Size) -> tuple[Problem, float]:
        """The inputs at a size, and the bandwidth there; the last ones are kept."""
        if self._problem is None or self._problem[0] != size:
            self._problem = None  # free it first
            _forget_compiled()
            problem = make_problem(size, self.device)
            speeds = bandwidths(problem, self.seconds / 2)
            for b in speeds:
                self.emit(
                    "bandwidth",
                    **size._asdict(),
                    variant=b.variant,
                    gb_per_s=b.gb_per_s,
                    **b.timing._asdict(),
                )
            self._problem = size, problem, max(b.gb_per_s for b in speeds)
        return self._problem[1:]

    def run_cases(self, cases: Sequence[Case]) -> None:
        """The library's contenders of one backend; without one, all the others."""
        if self.backend is None:
            self.load_peers()
        for case in cases:
            size = self.size(case.size)
            steps = [step for step in self.steps(case) if not self.has(step, case, size)]
            if not steps:
                continue
            problem, gb_per_s = self.problem(size)
            if case.active_share < 1:
                problem = problem.with_active_share(case.active_share)
            if case.negatives != "none":
                problem = problem.with_negatives(case.negatives)
            for step in steps:
                # A loss without a masked target takes rows without a removed token.
                mine = problem.all_positive() if step.work else problem
                record = measure_step(step, mine, gb_per_s, self.seconds, case.negatives)
                self.emit("case", **{**record, "active_share": case.active_share})

    def has(self, step: Step, case: Case, size: Size) -> bool:
        return self.is_done(
            "case", contender=step.contender, backend=step.backend, method=step.method, work=step.work,
            negatives=case.negatives, active_share=case.active_share, **size._asdict(),
        )  # fmt: skip

    def steps(self, case: Case) -> Iterator[Step]:
        if self.backend:
            for contender in case.library:
                yield library_step(contender, case.method, self.kernel_backend)
            return
        if case.peers:
            yield from peers.steps(self.loaded, case.method)
        for contender in case.others:
            if not (self.tiny and contender == "compiled"):  # it would take the most of that time
                yield library_step(contender, case.method)

    def load_peers(self) -> None:
        failed = peers.install(self.a.wheels, Path(tempfile.mkdtemp()))
        for wheel, why in failed.items():
            print(f"{wheel}: {why}", flush=True)
        self.loaded, found = peers.load_all(self.device)
        for peer in found:
            self.emit("peer", **peer)

    def bandwidth(self) -> None:
        for vocab in (MAIN.vocab, *VOCABULARIES):
            self.problem(self.size(MAIN._replace(vocab=vocab)))

    def speed(self) -> None:
        self.run_cases(SPEED)
        self._problem = None
        for distance in DISTANCES[: 1 if self.tiny else None]:
            for method in ("tnff", "tnrr"):
                self.at_a_distance(method, distance)

    def at_a_distance(self, method: str, distance: float) -> None:
        """A quarter of the rows, so that a distance costs no more than its launches."""
        size = self.size(MAIN._replace(rows=2048))
        problem = make_problem(size, self.device, distance)
        step = library_step("in place", method, self.kernel_backend)
        record = measure_step(step, problem, 1.0, self.seconds / 4)
        for name in ("floor_ms", "fraction_of_floor"):
            record.pop(name, None)
        self.emit("distance", distance=distance, **record)

    # --- one row each, against float64 ---

    def smoke(self) -> None:
        vocabularies = self.a.vocab or SMOKE_VOCABULARIES[: 2 if self.tiny else None]
        for dtype in [self.a.dtype] if self.a.dtype else SMOKE_DTYPES:
            for vocab in vocabularies:
                for method in SMOKE_METHODS:
                    self.row(self.kernel_backend, method, dtype, vocab)

    def row(self, backend: str, method: str, dtype: str, vocab: int) -> None:
        """Of each kind of weight a row; the last also removes three tokens."""
        where = {"backend": backend, "method": method, "dtype": dtype, "vocab": vocab}
        print(f"smoke {where}", flush=True)  # in case that nothing follows
        generator = torch.Generator().manual_seed(vocab)
        logits, other = torch.randn(2, 4, vocab, generator=generator).mul_(3)
        ref_logits = logits + 0.3 * other
        z, r = (x.to(self.device, getattr(torch, dtype)) for x in (logits, ref_logits))
        ids = torch.full((4, 3), -1)
        ids[3] = torch.tensor([0, 3, vocab - 1])
        labels, weights = torch.tensor([1, 2, 4, 7]), torch.tensor([1.0, -1.0, -0.3, 1.0])
        # A sanitizer would take its time for each of the truth's kernels.
        judge = torch.device("cpu") if self.a.instrumented else self.device
        found = []
        for name, device, double in (
            (backend, self.device, z.dtype),
            ("torch", judge, torch.float64),
        ):
            leaf = z.detach().to(device, double).requires_grad_()
            given = [x.to(device) for x in (labels, weights)]
            loss = tnt.tnt_loss(
                leaf, r.to(device, double), *given, method=method, negative_ids=ids.to(device), backend=name,
                reduction="none",
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            found.append((loss.detach().to(judge).double(), gradient.to(judge).double()))
        (loss, gradient), (true_loss, true_gradient) = found
        loss_error = ((loss - true_loss).abs() / true_loss.abs().clamp(min=1e-3)).max()
        error = ((gradient - true_gradient).abs().amax(-1) / true_gradient.abs().amax(-1)).max()
        good = bool(loss_error <= 1e-4) and bool(error <= TOLERANCE[z.dtype])
        errors = {"loss_error": float(loss_error), "gradient_error": float(error)}
        self.emit("smoke", **where, ok=good, **errors)

    def warm(self) -> None:
        """Compiles one part of what the later stages launch, on a few rows."""
        kind, what = WARM[self.a.part]
        if kind == "smoke":
            for vocab in SMOKE_VOCABULARIES[: 2 if self.tiny else None]:
                self.row(self.kernel_backend, what[0], what[1], vocab)
            return
        if kind == "linear":
            name, size = what
            size = size._replace(vocab=2000) if self.tiny else size
            linear.make_step(name, self.kernel_backend)(linear.make_problem(size, self.device))
            return
        problem = make_problem(self.size(what.size)._replace(rows=16), self.device)
        problem = problem.with_negatives(what.negatives)
        for contender in what.library:
            step = library_step(contender, what.method, self.kernel_backend)
            measure_step(step, problem, 1.0, 0.0)

    # --- Nsight Compute ---

    def launch(self) -> None:
        """Each of ``PROFILED`` twice, of which the profiler is shown the second."""
        problem = make_problem(self.size(PROFILED_SIZE), self.device)
        for what in PROFILED:
            method, _, forward = what.partition(" ")
            loss = make_loss("forward" if forward else "in place", method, self.kernel_backend)
            for profiled in (False, True):
                problem.restore()
                self.synchronize()
                if profiled and self.device.type == "cuda":
                    torch.cuda.profiler.start()
                if forward:
                    inputs = (problem.logits, problem.ref_logits, problem.labels, problem.weights)
                    with torch.no_grad():
                        loss(*inputs, None)
                else:
                    training_step(loss, problem)
                self.synchronize()
                if profiled and self.device.type == "cuda":
                    torch.cuda.profiler.stop()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def pages(self) -> None:
        """The figures that decide, of every report; they, their texts and all samples go into an archive."""
        reports = sorted(self.a.reports.glob("*.ncu-rep"))
        with (
            zipfile.ZipFile(self.a.archive, "w", zipfile.ZIP_DEFLATED) as self.zip,
            ThreadPoolExecutor(16) as pool,
        ):
            jobs = [pool.submit(self.archive, report, page) for page in PAGES for report in reports]
            for report in reports:
                with self.lock:
                    self.zip.write(report, report.name)
            for job in jobs:
                job.result()

    def archive(self, report: Path, page: str) -> None:
        """One page of a report; the one of instructions takes a while, so they are made at once."""
        command = ["ncu", "--import", str(report), "--page", *PAGES[page]]
        # To a file: whatever ncu has started may keep a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            try:
                subprocess.run(command, stdout=output, timeout=PAGE_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"{report.stem}: {page} takes too long", flush=True)
                return
            output.seek(0)
            text = output.read()
        with self.lock:
            self.zip.writestr(f"{report.stem}.{page}", text)
            if page == "raw.csv":
                for record in profiles(text):
                    self.emit("profile", backend=report.stem, **record)

    # --- launch settings ---

    def settings(self) -> None:
        """Every one in this process, so the most likely come first."""
        for vocab in SETTINGS_VOCABULARIES[: 1 if self.tiny else None]:
            size = self.size(MAIN._replace(vocab=vocab, rows=MAIN.rows * MAIN.vocab // vocab // 2))
            problem, gb_per_s = self.problem(size)
            each = self.triton_settings if self.backend == "triton" else self.cuda_settings
            for setting in each(vocab):
                step = library_step("in place", "tnff", self.kernel_backend)
                record = measure_step(step, problem, gb_per_s, self.seconds / 4)
                self.emit("setting", **setting, **record)

    def triton_settings(self, vocab: int) -> Iterator[dict[str, Any]]:
        """The usual columns and warps, then others."""
        rows = {
            "vocab": self.size(MAIN._replace(vocab=vocab)).vocab, "itemsize": 2, "kind": "KL", "gradient": True,
            "ids": False, "architecture": triton.architecture(self.device),
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            for config in dict.fromkeys((row_config(**rows), *SETTINGS)):
                # A file of its own: the library reads each once.
                table = Path(folder, "-".join(map(str, config)))
                table.write_text(json.dumps({table_key(**rows): config}))
                with mock.patch.dict(os.environ, TNT_KERNELS_TUNING=str(table)):
                    yield config._asdict()

    def cuda_settings(self, vocab: int) -> Iterator[dict[str, Any]]:
        """The usual blocks a row and threads a block, then others that the kernel has room for."""
        for setting in ({}, *CUDA_SETTINGS[vocab]):
            variables = {f"TNT_KERNELS_CUDA_{k.upper()}": str(v) for k, v in setting.items()}
            os.environ.update(variables)
            yield setting
            for name in variables:
                del os.environ[name]
            if self.device.type == "cuda":
                from tnt_kernels import _C  # other stages run while it is built

                _C.forget_plans()

    # --- the fused linear loss ---

    def run_linear(
        self, size: linear.LinearSize, contenders: Sequence[str], share: float = 1.0
    ) -> None:
        """``linear_tnt_loss`` against its matmuls, and what there is besides."""
        if self.tiny:
            size = size._replace(rows=min(size.rows, 48), hidden=32, vocab=2000)
        self._problem = None
        _forget_compiled()
        problem = linear.make_problem(size, self.device).with_active_share(share)
        todo: list[tuple[str, str | None, str, Callable[[], Any]]] = []
        for name in contenders:
            backend = self.kernel_backend if name in linear.FUSED else None
            todo.append((name, backend, "", lambda n=name, b=backend: linear.make_step(n, b)))
        if self.backend is None and share == 1:
            for peer in peers.LINEAR_PEERS:
                if peer.name in self.loaded:
                    todo.append((peer.name, None, peer.work, lambda n=peer.name: self.loaded[n]))
        for name, backend, work, make in todo:
            key = {
                "contender": name,
                "backend": backend,
                "work": work,
                "active_share": share,
                **size._asdict(),
            }
            if self.is_done("linear", **key):
                continue
            try:
                found = self.measure_linear(make(), name, problem)
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {error}"[:200]}
            self.emit("linear", **key, **found)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def measure_linear(
        self, step: linear.Step, name: str, problem: linear.LinearProblem
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        gradients = step(problem)
        if isinstance(step, linear.Floor):
            found["chunking"] = str(step.chunking(problem))
        methods = {p.name: p.method for p in peers.LINEAR_PEERS}
        method = methods.get(name, "tnff")
        if name != "floor" and method is not None:
            # Of a peer's plain LL, too: the library's, on rows of weight 1.
            ones = problem._replace(weights=torch.ones_like(problem.weights))
            truth = ones if name in methods else linear.posed(problem, name)
            found["gradient_error"] = linear.check(gradients, truth, method)
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

    def table(self) -> None:
        self.run_cases(TABLE)

    def sweeps(self) -> None:
        self.run_cases(SWEEPS)

    def compiled(self) -> None:
        self.run_cases(COMPILED)

    def linear(self) -> None:
        if self.backend:
            self.run_linear(LINEAR, linear.FUSED)
            self.run_linear(LINEAR, ("fused",), 0.25)
            return
        self.load_peers()
        self.run_linear(LINEAR, ("floor", "unfused", "naive"))
        self.run_linear(LINEAR, ("floor",), 0.25)

    def linear_sweeps(self) -> None:
        for size in LINEAR_SIZES:
            self.run_linear(size, ("fused", "pairs") if self.backend else ("floor", "naive"))

    # --- accuracy, and the host's time ---

    def accuracy(self) -> None:
        size = Size(8, 2000, "float32") if self.tiny else accuracy.SIZE
        self.load_peers()
        probe = torch.empty(1, 1, device=self.device)
        names = [b for b in ("cuda", "triton") if not BACKENDS[b].why_not(probe)] or ["torch"]
        steps = [
            step
            for method in ("tnff", "tnrr")
            for step in (
                *(library_step("fresh", method, b) for b in names),
                *(library_step(c, method) for c in ("naive", "naive, narrow")),
                *peers.steps(self.loaded, method),
            )
        ]
        for record in accuracy.measure(size, self.device, steps=steps):
            self.emit("accuracy", **record)
        size = linear_accuracy.QUICK_SIZE if self.tiny else linear_accuracy.SIZE
        kls = linear_accuracy.QUICK_KLS if self.tiny else linear_accuracy.KLS
        for backend in names:
            contenders = [
                c for c in linear_accuracy.CONTENDERS if c.has_backend or backend == names[0]
            ]
            for record in linear_accuracy.measure(
                size, self.device, dtypes=("bfloat16",), methods=("tnff",), kls=kls,
                contenders=contenders, backend=backend,
            ):  # fmt: skip
                self.emit("linear_accuracy", **record)

    def overhead(self) -> None:
        """What a call costs the host: forward and backward of one row of eight, launches included, waited for once."""
        logits, reference = (torch.randn(1, 8, device=self.device) for _ in range(2))
        labels = torch.tensor([3], device=self.device)
        weights = torch.tensor([-1.0], device=self.device)
        names = [b for b in ("cuda", "triton") if not BACKENDS[b].why_not(logits)] or ["torch"]
        count = 10 if self.tiny else 100
        calls = [(f"{c}, {b}", make_loss(c, "tnff", b)) for b in names for c in LIBRARY[:2]]
        for name, loss in (*calls, ("naive", make_loss("naive", "tnff"))):

            def call(loss: Any = loss) -> None:
                for _ in range(count):
                    loss(model_output(logits), reference, labels, weights, None).backward()

            call()
            timing = time_calls(call, torch.device("cpu"), seconds=0.2, most=20)
            self.emit("overhead", call=name, us=timing.ms_median * 1e3 / count)
            self.synchronize()


#: What is asked of a report, by the name in the archive.
PAGES = {
    "raw.csv": ["raw", "--csv"],
    "txt": ["details"],
    "sass.csv": ["source", "--csv", "--print-source", "sass"],
}
#: Less than the process has, or its archive would never be closed.
PAGE_SECONDS = 18
#: Of Nsight Compute's hundreds: time, bytes, issue slots, instructions, occupancy, stalls, caches.
METRICS = (
    r"^(gpu__time_duration\.sum|dram__bytes_(read|write)\.sum|lts__t_sector_hit_rate\.pct|"
    r"smsp__issue_active\.avg\.pct_of_peak_sustained_active|smsp__inst_executed\.sum|"
    r"sm__warps_active\.avg\.pct_of_peak_sustained_active|sm__inst_executed_pipe_\w+\.avg\.pct_of_peak_sustained_active|"
    r"launch__(registers_per_thread|waves_per_multiprocessor|cluster_size|shared_mem_per_block)|"
    r"derived__local_spilling_requests|smsp__average_warps_issue_stalled_\w+_per_issue_active\.ratio)$"
)
UNITS = {
    "Gbyte": 1e9, "Mbyte": 1e6, "Kbyte": 1e3, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9,
}  # fmt: skip


def profiles(raw: str) -> Iterator[dict[str, Any]]:
    """Each launch of ``PROFILED`` with its figures, in bytes and seconds, from a report's page of raw figures.

    They are those of its first kernel: another one behind it looks for rows that this one has left.
    """
    head, units, *rows = csv.reader(io.StringIO(raw[raw.index('"ID"') :]))
    at = head.index("Kernel Name")
    for what, row in zip(PROFILED, (x for x in rows if x[at] == rows[0][at]), strict=False):
        record: dict[str, Any] = {"launch": what, **PROFILED_SIZE._asdict()}
        record["kernel"] = row[at][:80]
        for name, unit, value in zip(head, units, row, strict=True):
            if re.search(METRICS, name):
                scale = UNITS.get(unit.partition("/")[0], 1.0)
                record[name] = float(value.replace(",", "")) * scale
        yield record


SETTINGS_VOCABULARIES = (128256, 32000, 262144)
#: The last number is how many registers a lane may have: with fewer, more programs share a multiprocessor.
SETTINGS = (
    RowConfig(8192, 32, 1), RowConfig(4096, 16, 1, 64), RowConfig(4096, 16, 2, 64),
    RowConfig(4096, 16, 1, 40), RowConfig(8192, 16, 1, 64), RowConfig(2048, 8, 1, 64),
    RowConfig(8192, 32, 2), RowConfig(16384, 32, 1), RowConfig(4096, 8, 1, 64),
    RowConfig(1024, 4, 1, 64), RowConfig(2048, 4, 1, 64),
)  # fmt: skip
#: Blocks of half the threads: as many warps in twice the blocks, or half of them with twice the work.
CUDA_SETTINGS: dict[int, tuple[dict[str, int], ...]] = {
    32000: tuple({"cluster": c, "threads": t} for c, t in ((4, 128), (2, 128), (8, 64), (4, 256))),
    128256: tuple(
        {"cluster": c, "threads": t} for c, t in ((16, 128), (8, 128), (16, 64), (16, 256))
    ),
    262144: tuple({"cluster": c, "threads": t} for c, t in ((16, 128), (8, 256), (8, 128))),
}


def _forget_compiled() -> None:
    """What is compiled for one size is not for the next. Importing the compiler for that takes two seconds."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Of ``records.jsonl``, all but its first line, which says whose they are."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stages", description=__doc__)
    parser.add_argument("stage", choices=[n for n in vars(Stages) if not n.startswith("_")])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--backend", choices=list(BACKENDS), help="default: those who are not the library"
    )
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--wheels", type=Path, default=peers.WHEELS)
    parser.add_argument("--done", type=Path, help="records.jsonl of what there is already")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtype", choices=SMOKE_DTYPES, help="of smoke")
    parser.add_argument("--vocab", type=int, nargs="+", help="of smoke")
    parser.add_argument("--part", type=int, help="of warm")
    parser.add_argument(
        "--instrumented", action="store_true", help="under a tool, which is to see a normal exit"
    )
    parser.add_argument("--reports", type=Path, help="of pages: the folder")
    parser.add_argument("--archive", type=Path, help="of pages")
    a = parser.parse_args(argv)
    status = 0
    try:
        getattr(Stages(a), a.stage)()
    except Exception:
        traceback.print_exc()
        status = 1
    if a.instrumented:
        sys.exit(status)
    # Autograd's threads may abort a process whose interpreter ends while they let go of what they held
    # (pytorch/pytorch#38228), all of it measured and printed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
