"""A GPU's time in stages: ``python -m benchmarks.gpu_suite --out DIR --stages build,smoke,speed``, offline.

Every stage is one or several processes with time limits: what hangs or crashes is killed, reported and passed over,
and its records up to then are kept. Each record is written to ``records.jsonl`` as it is measured; at the end they
make up ``gpu.json``, which ``benchmarks.report`` shows, and ``summary.md``, a page to read first. ``gpu.log`` has all
output, and ``profiles.zip`` what Nsight Compute found.
``--resume gpu.json``, or the ``records.jsonl`` of a run that was cut off, takes over what that run measured of the
same commit on the same device. ``--tiny --device cpu`` runs the stages without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

import torch

from benchmarks import gpu_stages, peers
from benchmarks.gpu_summary import summary
from benchmarks.report import ROOT
from benchmarks.results import commit
from tnt_kernels.bench.cli import environment

#: The vocabularies of which a sanitizer sees a row each: more take minutes under it.
SANITIZED = (17, 5000, 60001)
EXTENSION = "extension"  # the process that builds it
#: Nsight Compute's sections beyond "detailed": who waits for what.
SECTIONS = ("WarpStateStats", "SchedulerStats", "InstructionStats")
#: Where ``gpu.json`` has the records of each kind.
KINDS = {
    "end": "stages", "bandwidth": "bandwidth", "case": "cases", "distance": "distances", "peer": "peers",
    "linear": "linear", "accuracy": "accuracy", "overhead": "overhead", "smoke": "smoke", "setting": "settings",
    "profile": "profiles", "linear_accuracy": "linear_accuracy",
}  # fmt: skip
#: Kinds of which a process measures only what is missing.
ONE_BY_ONE = ("case", "linear")
#: More than any run should say, and less than a result file may have.
LOG_BYTES = 8 << 20


class Command(NamedTuple):
    """One process of a stage."""

    words: Sequence[str]
    environment: Mapping[str, str] = MappingProxyType({})
    name: str = ""  # to tell a stage's processes apart
    seconds: float | None = None  # its part, if they follow each other; None: an equal one


class Stage(NamedTuple):
    seconds: float  # after which what still runs is killed
    commands: Callable[[argparse.Namespace], list[Command]]
    at_once: bool = False  # its processes; else they follow each other


def _python(a: argparse.Namespace, stage: str, *words: object) -> list[str]:
    """A process of gpu_stages.py."""
    command = [sys.executable, "-m", "benchmarks.gpu_stages", stage, "--device", str(a.device)]
    command += ["--seconds", str(a.seconds), "--wheels", str(a.wheels)]
    command += ["--done", str(a.out / "records.jsonl")]
    return [*command, *(["--tiny"] if a.tiny else []), *map(str, words)]


def _each_backend(stage: str, *words: object) -> Callable[[argparse.Namespace], list[Command]]:
    return lambda a: [
        Command(_python(a, stage, "--backend", b, *words), name=b) for b in a.backends
    ]


def _build(a: argparse.Namespace) -> list[Command]:
    """The extension, and in processes beside it Triton's kernels, which the later ones then find in its cache."""
    warm = [
        Command(_python(a, "warm", "--backend", "triton", "--part", part), name=f"warm {part}")
        for part in range(1 if a.tiny else len(gpu_stages.WARM))
    ] if "triton" in a.backends else []  # fmt: skip
    if a.prebuilt or a.tiny:
        return warm
    major, minor = torch.cuda.get_device_capability()
    settings = {
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count()),
        "TNT_KERNELS_FORCE_CUDA_BUILD": "1",
    }
    extension = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return [Command(extension, settings, EXTENSION), *warm]


def _smoke(a: argparse.Namespace) -> list[Command]:
    blocking = {"CUDA_LAUNCH_BLOCKING": "1"}
    return [
        Command(_python(a, "smoke", "--backend", b, "--dtype", d), blocking, f"{b} {d}")
        for b in a.backends
        for d in gpu_stages.SMOKE_DTYPES
    ]


def _sanitize(tool: str) -> Callable[[argparse.Namespace], list[Command]]:
    # Each tensor is an allocation of its own, or nothing is out of bounds.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    sanitizer = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        "--print-limit",
        "20",
    ]

    def commands(a: argparse.Namespace) -> list[Command]:
        vocabularies = SANITIZED[:1] if a.tiny else SANITIZED
        found = []
        for backend in a.backends:
            words = ("--backend", backend, "--instrumented", "--vocab", *vocabularies)
            smoke = _python(a, "smoke", *words)
            found.append(Command([*([] if a.tiny else sanitizer), *smoke], settings, backend))
        return found

    return commands


def _ncu(a: argparse.Namespace) -> list[Command]:
    """``profiles.zip`` has the reports, their text, and the figures of every instruction."""
    folder, found = Path(tempfile.mkdtemp()), []
    for backend in a.backends:
        ncu = ["ncu", "--clock-control", "none", "--set", "detailed"]
        for section in SECTIONS:
            ncu += ["--section", section]
        names = "regex:kl_kernel|stream_kernel"  # what computes rows, of Triton and of CUDA
        ncu += ["--profile-from-start", "off", "--kernel-name", names]
        ncu += ["--export", str(folder / f"{backend}.ncu-rep")]
        launch = _python(a, "launch", "--backend", backend, "--instrumented")
        # A module with many kernels costs ncu 4 s a launch: it counts the executions of every instruction.
        seconds = 46 if backend == "cuda" else 22
        found.append(Command([*([] if a.tiny else ncu), *launch], name=backend, seconds=seconds))
    pages = _python(a, "pages", "--reports", folder, "--archive", a.out / "profiles.zip")
    return [*found, Command(pages, name="pages", seconds=24)]


def _tests(a: argparse.Namespace) -> list[Command]:
    tests = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    if a.tiny:
        return [Command([*tests, "--collect-only", "-qq", "tests/test_gpu.py"])]
    # A test that waits for the GPU for ever takes its worker with it, and xdist starts another.
    limit = ["--timeout", "60", "--timeout-method", "thread"]
    # Most of a test's time is the oracle's, on a core of its own.
    return [Command([*tests, "-n", str(max(2, (os.cpu_count() or 2) - 2)), *limit, "tests"])]


def _alone(stage: str, *words: object) -> Callable[[argparse.Namespace], list[Command]]:
    return lambda a: [Command(_python(a, stage, *words))]


def _cases(stage: str) -> Callable[[argparse.Namespace], list[Command]]:
    """The library's backends each in a process, so that a crash of one takes no figure of another; then the others."""

    def commands(a: argparse.Namespace) -> list[Command]:
        return [*_each_backend(stage)(a), Command(_python(a, stage), name="others")]

    return commands


#: A first call, build to ncu, may take less than 300 s in all, a second, build and table to sweeps, less than 600.
STAGES: dict[str, Stage] = {
    "build": Stage(75, _build, at_once=True),
    "smoke": Stage(25, _smoke, at_once=True),
    "memcheck": Stage(32, _sanitize("memcheck"), at_once=True),
    "synccheck": Stage(24, _sanitize("synccheck"), at_once=True),
    "bandwidth": Stage(20, _alone("bandwidth")),
    "speed": Stage(42, _each_backend("speed")),
    "ncu": Stage(92, _ncu),
    "table": Stage(120, _cases("table")),
    "settings": Stage(60, _each_backend("settings")),
    "linear": Stage(90, _cases("linear")),
    "tests": Stage(120, _tests),
    "sweeps": Stage(120, _cases("sweeps")),
    "accuracy": Stage(30, _alone("accuracy")),
    "overhead": Stage(20, _alone("overhead")),
    "linear_sweeps": Stage(60, _cases("linear_sweeps")),
    "compiled": Stage(60, _alone("compiled")),
    "racecheck": Stage(60, _sanitize("racecheck"), at_once=True),
}
#: It may report the bulk copies, which it does not follow.
ON_REQUEST = ("racecheck",)


class Runner:
    """Runs processes, writes down what they say, kills them in time."""

    def __init__(
        self, records: TextIO, log: TextIO, earlier: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.records_file, self.log_file, self.logged = records, log, 0
        self.begun = time.monotonic()
        self.records: list[dict[str, Any]] = []
        self.earlier = list(earlier)  # what is still to be taken over

    def log(self, text: str) -> None:
        line = f"{time.monotonic() - self.begun:7.1f} {text}"[:2000]
        print(line, flush=True)
        self.logged += len(line.encode()) + 1
        if self.logged < LOG_BYTES:
            self.log_file.write(line + "\n")
            self.log_file.flush()

    def record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.records_file.write(json.dumps(record) + "\n")
        self.records_file.flush()

    def take_over(self, stage: str, commands: Sequence[Command]) -> list[Command]:
        """An earlier run's records of a stage; returns the processes that did not end well there."""
        mine = [r for r in self.earlier if r["stage"] == stage]
        self.earlier = [r for r in self.earlier if r["stage"] != stage]
        done = {r["process"] for r in mine if r["kind"] == "end" and r["ended"] == "ok"}
        # What a build made may be elsewhere, and a page is made of reports that nobody has kept.
        if stage == "build" or (stage == "ncu" and any(c.name not in done for c in commands)):
            done = set()
        for r in mine:
            if r["process"] in done or (r["kind"] in ONE_BY_ONE and "failed" not in r):
                self.record(r)
        return [c for c in commands if c.name not in done]

    def run(self, stage: str, commands: Sequence[Command], seconds: float) -> None:
        """All at once. What still runs after ``seconds`` is killed with its children."""
        # Bounded: who says more than is read has to wait.
        lines: queue.Queue[tuple[int, str | None]] = queue.Queue(1000)
        begun = time.monotonic()
        running: dict[int, subprocess.Popen[str]] = {}
        ends: dict[int, tuple[str, float]] = {}
        for i, command in enumerate(commands):
            try:
                running[i] = process = subprocess.Popen(
                    command.words, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.end(stage, command, str(error), 0.0)
                continue
            threading.Thread(target=_read, args=(i, process, lines), daemon=True).start()
        silent: set[int] = set()
        while running:
            now = time.monotonic() - begun
            for i, process in list(running.items()):
                if i not in ends:
                    if process.poll() is not None:
                        ends[i] = _status(process.returncode), now
                        _kill(process)  # its children: they may keep its output open
                    elif now > seconds:
                        ends[i] = f"killed after {seconds:.0f} s", now
                        _kill(process)
                # A child in a session of its own may keep it open still.
                elif i in silent or now > ends[i][1] + 5:
                    process.poll()
                    del running[i]
                    self.end(stage, commands[i], *ends[i])
            with contextlib.suppress(queue.Empty):
                i, line = lines.get(timeout=0.05)
                if line is None:
                    silent.add(i)
                else:
                    self.hear(stage, commands[i], line)

    def hear(self, stage: str, command: Command, line: str) -> None:
        """A line of a process: a record if it is a JSON object with a kind, and something to log."""
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if said.get("kind") in KINDS:
                    self.record({"stage": stage, "process": command.name, **said})
        self.log(f"{stage} {command.name}| {line}")

    def end(self, stage: str, command: Command, ended: str, seconds: float) -> None:
        self.log(f"{stage} {command.name}: {ended}, {seconds:.1f} s")
        self.record({
            "stage": stage, "process": command.name, "kind": "end", "ended": ended, "seconds": round(seconds, 1),
        })  # fmt: skip


def _read(
    i: int, process: subprocess.Popen[str], lines: queue.Queue[tuple[int, str | None]]
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put((i, line.rstrip("\n")))
    lines.put((i, None))


def _status(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit status {code}" if code else "ok"


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_stages(a: argparse.Namespace, runner: Runner, stages: Mapping[str, Stage] = STAGES) -> None:
    end, broken = runner.begun + a.budget, False
    for name in a.stages:
        left = end - time.monotonic()
        if left < 1 or broken:
            why = "the extension is not built" if broken else "the time is over"
            runner.end(name, Command([]), f"left out, {why}", 0.0)
            continue
        stage = stages[name]
        commands = runner.take_over(name, stage.commands(a))
        seconds = min(stage.seconds, left)
        runner.log(f"--- {name}, at most {seconds:.0f} s")
        if stage.at_once:
            runner.run(name, commands, seconds)
            # Without it nothing of the CUDA kernels can be measured: the GPU goes back, for another try.
            broken = "cuda" in a.backends and any(
                r["kind"] == "end" and r["process"] == EXTENSION and r["ended"] != "ok"
                for r in runner.records
            )
            continue
        parts = [c.seconds or stage.seconds / len(commands) for c in commands]
        stage_end = time.monotonic() + seconds
        for i, command in enumerate(commands):
            # Its own part, and what those before it have left.
            later = sum(parts[i + 1 :]) * seconds / stage.seconds
            runner.run(name, [command], max(1.0, stage_end - time.monotonic() - later))
    for record in runner.earlier:
        runner.record(record)


def earlier_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of which run a results file is, and its records: from ``records.jsonl`` or ``gpu.json``."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        lines = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # the last may be cut off
                lines.append(json.loads(line))
        return lines[0], lines[1:]
    results = json.loads(text)
    records = [{"kind": kind, **r} for kind, name in KINDS.items() for r in results[name]]
    return results["run"], records


def gather(
    records: Sequence[dict[str, Any]], where: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """``gpu.json``: the records by kind, and where they come from."""
    kinds: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS.values()}
    seen = set()
    for record in records:
        # A figure that another stage has taken over, or another run, is there once.
        figure = json.dumps({k: v for k, v in record.items() if k not in ("stage", "process")})
        if record["kind"] not in ("case", "distance", "linear") or figure not in seen:
            kinds[KINDS[record["kind"]]].append({k: v for k, v in record.items() if k != "kind"})
        seen.add(figure)
    return {"quick": run["tiny"], **where, "commit": run["commit"], "run": run, **kinds}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--stages",
        default=",".join(s for s in STAGES if s not in ON_REQUEST),
        help=f"in this order, of {', '.join(STAGES)}; default: all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--backends", default="cuda,triton", help="the library's; default: %(default)s"
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="that one contender is timed for"
    )
    parser.add_argument(
        "--wheels", type=Path, default=peers.WHEELS, help="folder of the peers' wheels"
    )
    parser.add_argument("--prebuilt", action="store_true", help="the extension is built already")
    parser.add_argument("--resume", type=Path, help="gpu.json or records.jsonl of an earlier run")
    parser.add_argument(
        "--commit", default=commit(), help="where there is no repository: whose figures these are"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    a = parser.parse_args(argv)
    a.stages, a.backends = a.stages.split(","), a.backends.split(",")
    a.out, a.wheels = a.out.resolve(), a.wheels.resolve()  # processes run elsewhere
    if unknown := set(a.stages) - set(STAGES):
        parser.error(
            f"--stages: {', '.join(sorted(unknown))}, expected some of {', '.join(STAGES)}"
        )
    if a.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: no GPU that this torch can use; --device cpu --tiny tries the suite without one"
        )
    return a


def main(argv: Sequence[str] | None = None) -> None:
    a = parse(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    where = environment(a.device)
    run = {"commit": a.commit, "device": where["machine"]["device"], "tiny": a.tiny}
    of, earlier = earlier_records(a.resume) if a.resume else (run, [])
    with (a.out / "records.jsonl").open("w") as records, (a.out / "gpu.log").open("w") as log:
        records.write(json.dumps(run) + "\n")
        known = a.commit is not None and not a.commit.endswith("-dirty")
        runner = Runner(records, log, earlier if of == run and known else ())
        if a.resume and not runner.earlier:
            runner.log(f"nothing is taken over: {a.resume} is of {of}, this is {run}")
        try:
            run_stages(a, runner)
        finally:
            results = gather(runner.records, where, run)
            results["seconds"] = round(time.monotonic() - runner.begun, 1)
            (a.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            (a.out / "summary.md").write_text(summary(results))
            runner.log(f"wrote {a.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
