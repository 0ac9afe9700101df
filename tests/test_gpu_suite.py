"""The GPU suite without a GPU: every stage runs, and what hangs, crashes or runs out of memory loses only itself."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("not in this distribution", allow_module_level=True)
sys.path.append(str(ROOT))  # last: the package under test is the installed one
pytest.importorskip("pandas", reason="needs the extra bench")

from benchmarks import gpu_stages, gpu_suite, peers  # noqa: E402
from benchmarks.gpu_suite import ON_REQUEST, STAGES, Command, Stage  # noqa: E402
from benchmarks.gpu_summary import summary  # noqa: E402
from tnt_kernels.backends import triton as triton_backend  # noqa: E402
from tnt_kernels.bench.contenders import forward, training_step  # noqa: E402
from tnt_kernels.bench.measure import Bandwidth, Timing  # noqa: E402

#: What a first run on a GPU does, and a second one with what it showed mended.
FIRST = ("build", "smoke", "memcheck", "synccheck", "bandwidth", "speed", "ncu")
SECOND = ("build", "table", "settings", "linear", "tests", "sweeps")
#: What a workplace with a GPU may send back.
MOST_FILES, MOST_BYTES = 8, 16 << 20


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()[1:]]


def suite(out: Path, *words: str) -> dict[str, Any]:
    gpu_suite.main(["--out", str(out), "--device", "cpu", "--tiny", "--commit", "0123456", *words])
    results: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    return results


def fake(*scripts: str, seconds: float = 20, at_once: bool = False, **names: str) -> Stage:
    """A stage of processes that are given as scripts."""
    named = {**{str(i): script for i, script in enumerate(scripts)}, **names}
    commands = [Command([sys.executable, "-c", script], name=n) for n, script in named.items()]
    return Stage(seconds, lambda a: list(commands), at_once)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts fakes in the place of all stages; returns their names, as an argument."""

    def replace(**fakes: Stage) -> str:
        for name in list(STAGES):
            monkeypatch.delitem(STAGES, name)
        for name, stage in fakes.items():
            monkeypatch.setitem(STAGES, name, stage)
        return ",".join(fakes)

    return replace


def say(kind: str = "smoke", **record: Any) -> str:
    return f"print({json.dumps({'kind': kind, 'ok': True, **record})!r}.strip(), flush=True);"


def case(**changed: Any) -> dict[str, Any]:
    return {
        "contender": "in place", "backend": "cuda", "method": "tnff", "work": "", "negatives": "none",
        "active_share": 1.0, "rows": 8192, "vocab": 128256, "dtype": "bfloat16", "ms_min": 2.0,
        "fraction_of_floor": 0.9, "gradient_error": 1e-3, **changed,
    }  # fmt: skip


def ends(results: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(e["stage"], e["process"]): e["ended"] for e in results["stages"]}


# --- every stage ----------------------------------------------------------------------------------


def test_every_stage_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other take the longest
    out, none = tmp_path / "out", str(tmp_path / "none")
    order = [*sorted(set(STAGES) - {"build"}), "build"]
    words = ("--backends", "triton", "--wheels", none, "--stages", ",".join(order))
    results = suite(out, *words)
    assert set(ends(results).values()) == {"ok"}
    assert list(dict.fromkeys(e["stage"] for e in results["stages"])) == order
    assert {b["variant"] for b in results["bandwidth"]} == {
        "copy", "triad over an input", "triad elsewhere",
    }  # fmt: skip
    assert {(r["stage"], r["dtype"]) for r in results["smoke"]} >= {
        (stage, dtype)
        for stage in ("smoke", "memcheck", "synccheck", "racecheck")
        for dtype in ("bfloat16", "float32")
    }
    assert all(r["ok"] for r in results["smoke"])
    for kind in ("cases", "linear", "accuracy", "settings", "distances"):
        assert results[kind], kind
        assert all("failed" not in r for r in results[kind]), kind
    assert {c["stage"] for c in results["cases"]} == {"speed", "table", "sweeps"}
    assert {c["contender"] for c in results["cases"]} >= {"in place", "fresh", "forward", "naive"}
    assert {c["contender"] for c in results["linear"]} >= {"fused", "floor", "unfused", "naive"}
    assert {o["call"] for o in results["overhead"]} == {"in place, torch", "fresh, torch", "naive"}
    assert {p["name"] for p in results["peers"] if "missing" in p} >= {"Liger KLDiv"}
    files = sorted(out.iterdir())
    assert [f.name for f in files] == [
        "gpu.json", "gpu.log", "profiles.zip", "records.jsonl", "summary.md",
    ]  # fmt: skip
    assert len(records(out)) == sum(len(results[name]) for name in gpu_suite.KINDS.values())


def test_the_stages_fit_into_a_gpu_s_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(STAGES[name].seconds for name in FIRST) <= 310
    assert sum(STAGES[name].seconds for name in SECOND) < 600
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    a = gpu_suite.parse(["--out", str(tmp_path)])
    assert a.stages == [name for name in STAGES if name not in ON_REQUEST]
    for name, stage in STAGES.items():
        commands = stage.commands(a)
        assert len({c.name for c in commands}) == len(commands), name
        parts = [c.seconds for c in commands if c.seconds is not None]
        assert not parts or sum(parts) == stage.seconds, name
    (pattern,) = (w[6:] for w in STAGES["ncu"].commands(a)[0].words if w.startswith("regex:"))
    rows = ("kl_kernel", "stream_kernel")
    known = (*rows, "loss_kernel", "normalizer_kernel", "scale_kernel")
    assert tuple(name for name in known if re.search(pattern, name)) == rows
    (build, *warm) = STAGES["build"].commands(a)
    assert build.environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert len(warm) == len(gpu_stages.WARM)
    assert len(STAGES["build"].commands(gpu_suite.parse(["--out", "x", "--prebuilt"]))) == len(warm)


# --- what goes wrong ------------------------------------------------------------------------------

HANG = "import time; time.sleep(60)"


def orphan(mark: Path) -> str:
    """A child that outlives its parent with its output open, and would leave a mark."""
    child = f"import time; time.sleep(2.5); open({str(mark)!r}, 'w')"
    return f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]);"


def test_what_goes_wrong_loses_only_itself(tmp_path: Path, stages: Callable[..., str]) -> None:
    memory, marks = "x = bytearray(1 << 62)", [tmp_path / "1", tmp_path / "2"]
    names = stages(
        hangs=fake(say(n=1) + orphan(marks[1]) + HANG, seconds=2),
        hangs_deaf=fake("import signal; signal.signal(15, signal.SIG_IGN);" + say(n=2) + HANG, seconds=2),
        crashes=fake(say(n=3) + "import os; os.abort()"),
        fails=fake(say(n=4) + "raise SystemExit(3)"),
        out_of_memory=fake(say(n=5) + memory),
        killed=fake(say(n=6) + "import os; os.kill(os.getpid(), 9)"),
        absent=Stage(5, lambda a: [Command(["/nowhere/at/all"])]),
        orphan=fake(say(n=7) + orphan(marks[0])),
        floods=fake("print('x' * 999_999);" * 20 + say(n=8)),
        babbles=fake("print('{\"a\": 1}\\n{1}\\n[1]\\n{\"kind\": \"unheard of\"}');" + say(n=9)),
        # Beside each other.
        mixed=fake(say(n=10) + HANG, say(n=11) + "1 / 0", say(n=12), seconds=3, at_once=True),
        last=fake(say(n=13)),
    )  # fmt: skip
    begun = time.monotonic()
    results = suite(tmp_path, "--stages", names)
    assert time.monotonic() - begun < 20  # not one of them was waited for
    assert [r["n"] for r in sorted(results["smoke"], key=lambda r: r["n"])] == [*range(1, 14)]
    ended = {f"{stage} {process}": how for (stage, process), how in ends(results).items()}
    missing = ended.pop("absent ")
    assert "nowhere" in missing
    assert ended == {
        "hangs 0": "killed after 2 s",
        "hangs_deaf 0": "killed after 2 s",
        "crashes 0": "ended by SIGABRT",
        "fails 0": "exit status 3",
        "out_of_memory 0": "exit status 1",
        "killed 0": "ended by SIGKILL",
        "orphan 0": "ok",
        "floods 0": "ok",
        "babbles 0": "ok",
        "mixed 0": "killed after 3 s",
        "mixed 1": "exit status 1",
        "mixed 2": "ok",
        "last 0": "ok",
    }
    assert "MemoryError" in (tmp_path / "gpu.log").read_text()
    files = list(tmp_path.iterdir())
    assert not {*marks} & {*files}
    assert len(files) <= MOST_FILES
    assert all(f.stat().st_size < MOST_BYTES for f in files)
    text = (tmp_path / "summary.md").read_text()
    assert "- **crashes 0**: ended by SIGABRT" in text
    assert "**last" not in text


def test_the_log_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "LOG_BYTES", 10_000)
    with (tmp_path / "r").open("w") as r, (tmp_path / "l").open("w") as log:
        runner = gpu_suite.Runner(r, log)
        runner.run(
            "floods",
            fake("for i in range(999): print('x' * 99)").commands(argparse.Namespace()),
            20,
        )
    assert 5_000 < (tmp_path / "l").stat().st_size < 10_000
    (end,) = runner.records
    assert end["ended"] == "ok"


def test_records_are_there_before_a_stage_ends(tmp_path: Path, stages: Callable[..., str]) -> None:
    """A process reads what it has just said out of the file."""
    path = tmp_path / "records.jsonl"
    look = f"import time, pathlib; time.sleep(1); print('heard:', pathlib.Path({str(path)!r}).read_text())"
    suite(tmp_path, "--stages", stages(one=fake(say(n=1) + look)))
    assert "heard" in (tmp_path / "gpu.log").read_text()
    assert (tmp_path / "gpu.log").read_text().count('"n": 1') == 2


def test_every_process_has_its_own_seconds(tmp_path: Path, stages: Callable[..., str]) -> None:
    names = stages(both=fake("", "import time; time.sleep(1.5)", at_once=True))
    first, second = suite(tmp_path, "--stages", names)["stages"]
    assert first["seconds"] < 1 < second["seconds"]


def test_a_process_takes_no_time_from_those_after_it(
    tmp_path: Path, stages: Callable[..., str]
) -> None:
    """Its own part, and what those before it have left."""
    long = "import time; time.sleep(1.9)"
    commands = [
        Command([sys.executable, "-c", HANG], name="hangs", seconds=1),
        Command([sys.executable, "-c", ""], name="quick", seconds=2),
        Command([sys.executable, "-c", long], name="long", seconds=1),
    ]
    results = suite(tmp_path, "--stages", stages(one=Stage(4, lambda a: commands)))
    assert ends(results) == {
        ("one", "hangs"): "killed after 1 s", ("one", "quick"): "ok", ("one", "long"): "ok",
    }  # fmt: skip


def test_the_budget_is_kept(tmp_path: Path, stages: Callable[..., str]) -> None:
    names = stages(one=fake(say(n=1)), two=fake(HANG), three=fake(say(n=3)))
    begun = time.monotonic()
    results = suite(tmp_path, "--stages", names, "--budget", "3")
    assert time.monotonic() - begun < 6
    assert [e["stage"] for e in results["stages"]] == ["one", "two", "three"]
    assert ends(results)["two", "0"].startswith("killed after")
    assert ends(results)["three", ""] == "left out, the time is over"


# --- resumed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["gpu.json", "records.jsonl"])
def test_a_second_run_measures_what_the_first_did_not(
    tmp_path: Path, stages: Callable[..., str], file: str
) -> None:
    first, second, ran = tmp_path / "first", tmp_path / "second", tmp_path / "ran"

    def counted(name: str) -> str:
        return f"open({str(ran)!r}, 'a').write('{name} ');"

    measured = say("case", **case())
    failed = say("case", **case(contender="fresh", failed="out of memory"))
    fakes = {
        "build": fake(counted("build")),
        "good": fake(counted("good") + say(n=1)),
        "mixed": fake(counted("well") + say(n=2), counted("badly") + measured + failed + say(n=3) + "1 / 0"),
        "others": fake(counted("others") + say(n=4)),
        "late": fake(counted("late") + say(n=5)),
    }  # fmt: skip
    stages(**fakes)
    results = suite(first, "--stages", "build,good,mixed,others")
    assert ran.read_text().split() == ["build", "good", "well", "badly", "others"]
    if file == "records.jsonl":  # it was cut off as it was written
        path = first / file
        path.write_text(path.read_text() + '{"stage": "goo')
    ran.unlink()
    arguments = ("--stages", "build,good,mixed,late", "--resume", str(first / file))
    again = suite(second, *arguments)
    assert ran.read_text().split() == ["build", "badly", "late"]
    # Also of the stage that was not asked for; of the failed process, what it measured one by one.
    assert sorted(r["n"] for r in again["smoke"]) == [1, 2, 3, 4, 5]
    assert [c["contender"] for c in again["cases"]] == ["in place", "fresh"]
    assert len(again["stages"]) == 6
    assert len(results["cases"]) == 2
    # Of itself, too.
    ran.unlink()
    third = suite(second, "--stages", "good,mixed,late", "--resume", str(second / "gpu.json"))
    assert ran.read_text().split() == ["badly"]
    assert sorted(r["n"] for r in third["smoke"]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("what", ["commit", "device", "tiny", "dirty"])
def test_nothing_is_taken_over_from_elsewhere(
    tmp_path: Path, stages: Callable[..., str], what: str
) -> None:
    names = stages(one=fake(say(n=1)))
    commit = "0123456-dirty" if what == "dirty" else "0123456"
    suite(tmp_path / "first", "--stages", names, "--commit", commit)
    earlier = tmp_path / "first" / "gpu.json"
    results = json.loads(earlier.read_text())
    results["smoke"][0]["n"] = 2
    if what != "dirty":
        results["run"][what] = "another"
    earlier.write_text(json.dumps(results))
    words = ("--stages", names, "--resume", str(earlier), "--commit", commit)
    assert [r["n"] for r in suite(tmp_path / "second", *words)["smoke"]] == [1]
    assert "nothing is taken over" in (tmp_path / "second" / "gpu.log").read_text()


def test_pages_are_not_made_of_reports_that_are_gone(
    tmp_path: Path, stages: Callable[..., str]
) -> None:
    ran = tmp_path / "ran"
    count = f"open({str(ran)!r}, 'a').write('x');"
    names = stages(ncu=fake(cuda=count, pages=count + "raise SystemExit(1)"))
    suite(tmp_path / "out", "--stages", names)
    suite(tmp_path / "out", "--stages", names, "--resume", str(tmp_path / "out" / "gpu.json"))
    assert ran.read_text() == "xxxx"


def stage(backend: str | None = "triton", **options: Any) -> gpu_stages.Stages:
    """What a process runs, here."""
    defaults: dict[str, Any] = {
        "device": torch.device("cpu"), "tiny": True, "seconds": 0.0, "backend": backend, "done": None, "dtype": None,
        "vocab": None, "part": None, "instrumented": False, "wheels": Path("none"),
    }  # fmt: skip
    return gpu_stages.Stages(argparse.Namespace(**{**defaults, **options}))


def test_a_process_measures_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(*lines: str) -> list[tuple[str, str]]:
        path = tmp_path / "records.jsonl"
        path.write_text("\n".join(("{}", *lines)))
        stage(done=path).run_cases(gpu_stages.SPEED)
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found.extend(json.dumps(r) for r in said if r["kind"] == "case")
        return [(r["contender"], r["method"]) for r in said if r["kind"] == "case"]

    found: list[str] = []
    every = [("in place", "tnff"), ("forward", "tnff"), ("in place", "tnrr"), ("forward", "tnrr")]
    assert cases() == every
    first = found[:4]
    assert cases(*first[:2]) == every[2:]
    assert cases(*first) == []
    broken = json.dumps({**json.loads(first[0]), "failed": "out of memory"})
    assert cases(broken, *first[1:]) == every[:1]
    other = json.dumps({**json.loads(first[0]), "rows": 17})
    assert cases(other, *first[1:]) == every[:1]


def test_stages_run_while_the_extension_is_built() -> None:
    script = "import sys; sys.modules['tnt_kernels._C'] = None; from benchmarks import gpu_stages"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_settings_of_the_cuda_kernel_last_for_one_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def measured(*_: Any) -> dict[str, Any]:
        names = ("CLUSTER", "THREADS")
        seen.append(tuple(os.environ.get(f"TNT_KERNELS_CUDA_{name}") for name in names))
        return {"ms_min": 1.0}

    monkeypatch.setattr(gpu_stages, "measure_step", measured)
    stage("cuda").settings()
    tried = gpu_stages.CUDA_SETTINGS[gpu_stages.SETTINGS_VOCABULARIES[0]]
    assert seen == [(None, None), *((str(s["cluster"]), str(s["threads"])) for s in tried)]
    assert not [name for name in os.environ if name.startswith("TNT_KERNELS_CUDA_")]
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    settings = [r for r in said if r["kind"] == "setting"]
    assert [(r.get("cluster"), r.get("threads")) for r in settings[1:]] == [
        (s["cluster"], s["threads"]) for s in tried
    ]


# --- a stage's process ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["bandwidth", "--tiny"], 0),
        (["bandwidth", "--tiny", "--instrumented"], -6),
        (["smoke", "--backend", "cuda"], 1),  # there is no GPU
    ],
)
def test_the_end_of_an_interpreter_does_not_count(words: list[str], status: int) -> None:
    script = (
        "import atexit, os, sys; atexit.register(os.abort); sys.argv[0] = 'stages';"
        "from benchmarks import gpu_stages; gpu_stages.main()"
    )
    command = [sys.executable, "-c", script, *words, "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert ("Traceback" in result.stderr) == (status == 1)
    assert result.stdout.startswith("smoke" if status == 1 else '{"kind": "bandwidth"')


NCU = """#!/bin/sh
case "$*" in
*raw*) printf '%s\\n' '==PROF== chatter' '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum",'\
'"gpu__time_duration.sum","smsp__inst_executed.sum","smsp__issue_active.avg.pct_of_peak_sustained_active",'\
'"sm__warps_active.avg.pct_of_peak_sustained_active","lts__t_sector_hit_rate.pct","beside__the_point",'\
'"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"' \
'"","","Gbyte","Mbyte","us","inst","%","%","%","","inst"' \
'"0","kl_kernel","2.1","1,050","3,210","721,000,000","50.6","23.9","54.9","7","1.8"' \
'"1","stream_kernel","0.001","0.001","7","1,000","50.6","23.9","54.9","7","1.8"' \
'"2","kl_kernel","2.1","1,050","3,210","721,000,000","50.6","23.9","54.9","7","1.8"' \
'"3","stream_kernel","0.001","0.001","7","1,000","50.6","23.9","54.9","7","1.8"';;
*source*) SLEEP;;
*) echo details;;
esac
"""


@pytest.mark.parametrize("sleep", ["true", "sleep 5; true"])
def test_profiles_become_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sleep: str
) -> None:
    ncu, reports = tmp_path / "bin" / "ncu", tmp_path / "reports"
    for folder in (ncu.parent, reports):
        folder.mkdir()
    ncu.write_text(NCU.replace("SLEEP", sleep))
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ncu.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_stages, "PAGE_SECONDS", 2)
    (reports / "cuda.ncu-rep").write_bytes(b"report")
    stage(None, reports=reports, archive=tmp_path / "profiles.zip").pages()
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(r["backend"], r["launch"]) for r in found] == [("cuda", "tnff"), ("cuda", "tnrr")]
    assert {r["kernel"] for r in found} == {"kl_kernel"}
    assert found[0].items() - {("launch", "tnff")} == found[1].items() - {("launch", "tnrr")}
    assert found[0]["dram__bytes_read.sum"] == pytest.approx(2.1e9)
    assert found[0]["dram__bytes_write.sum"] == pytest.approx(1.05e9)
    assert found[0]["gpu__time_duration.sum"] == pytest.approx(3.21e-3)
    assert "beside__the_point" not in found[0]
    hangs = sleep != "true"
    assert any("takes too long" in line for line in lines) == hangs
    expected = {"cuda.ncu-rep", "cuda.raw.csv", "cuda.txt", *([] if hangs else ["cuda.sass.csv"])}
    with zipfile.ZipFile(tmp_path / "profiles.zip") as archive:
        assert set(archive.namelist()) == expected
    text = summary({**empty(), "profiles": [{**found[0], "stage": "ncu"}]})
    assert "| cuda, tnff, elements moved a pair | 3 |  |  | 3 |" in text
    assert "| cuda, tnff, instructions a pair | 43.9 |  |  | 36–39 |" in text
    assert "| cuda | tnff | 3.21 | 2.1 | 1.05 | 54.9 | 50.6 | 23.9 |  | barrier 1.80 |" in text


# --- the page of verdicts -------------------------------------------------------------------------


def empty(device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    where = {"machine": {"device": device}, "date": "2026-01-02T03:04:05"}
    return gpu_suite.gather([], where, {"tiny": False, "commit": "0123456789ab", "device": device})


def test_verdicts() -> None:
    linear = {
        "contender": "fused",
        "backend": "cuda",
        "rows": 8192,
        "hidden": 4096,
        "vocab": 128256,
        "dtype": "bfloat16",
    }
    results = {
        **empty(),
        "cases": [
            case(),
            case(method="tnrr", fraction_of_floor=0.5),
            case(method="tnff", contender="forward", ms_min=1.0, fraction_of_floor=0.2),
            case(backend="triton", fraction_of_floor=0.6),
            case(active_share=0.1, fraction_of_floor=0.76),
            case(negatives="64 a row", ms_min=2.5),
            case(contender="naive", backend=None, ms_min=30.0),
            case(contender="compiled", backend=None, failed="RuntimeError: no"),
        ],
        "linear": [
            {**linear, "active_share": 1.0, "ms_min": 23.0},
            {**linear, "active_share": 1.0, "ms_min": 20.0, "contender": "floor", "backend": None},
        ],
    }  # fmt: skip
    text = summary(results)
    for line in (
        "# NVIDIA H100 80GB HBM3, 2026-01-02T03:04, commit 0123456789",
        "| cuda, tnff in place, of the floor | 0.9 | ≥ 0.85 | yes | 0.74–0.82 |",
        "| cuda, tnrr in place, of the floor | 0.5 | ≥ 0.85 | **no** | 0.74–0.82 |",
        "| cuda, tnff forward, of the floor | 0.2 | ≥ 0.9 | **no** |  |",
        "| triton, tnff in place, of the floor | 0.6 | ≥ 0.7 | **no** | 0.65–0.77 |",
        "| cuda, 10% active, of its floor | 0.76 | ≥ 0.75 | yes |  |",
        "| cuda, 64 a row ids, times none | 1.25 | ≤ 1.15 | **no** |  |",
        "| naive over cuda | 15 | ≥ 10 | yes |  |",
        "| naive over triton | 15 | ≥ 10 | yes |  |",
        "| linear, fused, cuda, 8192 × 4096 × 128256, times its matmuls | 1.15 | ≤ 1.15 | yes | 1.1 |",
        "- **failed**:  compiled, 8192 × 128256: RuntimeError: no",
    ):
        assert line in text.splitlines()
    (missing,) = (line for line in text.splitlines() if line.startswith("Not measured: "))
    assert "compiled over cuda" in missing
    assert "cuda, V = 32000, of the floor" in missing
    assert "cuda, tnff in place" not in missing
    other = summary({**results, "machine": {"device": "NVIDIA H200"}})
    assert "| cuda, tnff in place, of the floor | 0.9 | ≥ 0.75 | yes | 0.65–0.71 |" in other
    unknown = summary({**results, "machine": {"device": "A GPU"}})
    assert "| cuda, tnff in place, of the floor | 0.9 | ≥ 0.85 | yes |  |" in unknown


# --- what Triton compiles -------------------------------------------------------------------------

#: Kernels that the build compiles, and those that each stage is the first to compile after it.
BUILT = 88
COMPILED = {
    "smoke": 0, "bandwidth": 0, "speed": 0, "launch": 0, "table": 0, "settings": 10, "linear": 0, "sweeps": 6,
    "linear_sweeps": 0,
}  # fmt: skip


class Kernels:
    """In the place of Triton's: notes what would be compiled, and does nothing."""

    def __init__(self) -> None:
        self.module = triton_backend._kernels()
        self.compiled: set[Any] = set()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return _Kernel(name, value, self.compiled) if name.endswith("_kernel") else value


class _Kernel:
    def __init__(self, name: str, kernel: Any, compiled: set[Any]) -> None:
        self.name, self.kernel, self.compiled = name, kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            kinds = tuple(map(_specialised, arguments, self.kernel.params))
            self.compiled.add((self.name, kinds, tuple(sorted(options.items()))))

        return launch


def _specialised(x: Any, parameter: Any) -> Any:
    """What Triton compiles anew for."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0 or parameter.do_not_specialize_on_alignment
    if isinstance(x, int):
        exact = not parameter.do_not_specialize
        return int, exact and x == 1, exact and x % 16 == 0, x >= 1 << 31
    return type(x)


def test_the_build_compiles_what_is_launched_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    kernels = Kernels()
    monkeypatch.setattr(triton_backend, "_kernels", lambda: kernels)
    monkeypatch.setattr(triton_backend, "_interpreted", lambda: True)  # takes a CPU's tensors
    monkeypatch.setattr(triton_backend, "architecture", lambda device: "sm_90")

    def call(step: Any, problem: Any, *_: Any) -> dict[str, Any]:
        (training_step if step.with_gradient else forward)(step.loss, problem)
        return problem.size._asdict()

    monkeypatch.setattr(gpu_stages, "measure_step", call)
    monkeypatch.setattr(
        gpu_stages.Stages, "measure_linear", lambda self, step, name, p: step(p) and {}
    )
    copied = [Bandwidth("copy", 1.0, Timing(1.0, 1.0, 1))]
    monkeypatch.setattr(gpu_stages, "bandwidths", lambda problem, seconds: copied)
    monkeypatch.setattr(gpu_stages.Stages, "size", lambda self, size: size._replace(rows=16))
    for name in ("LINEAR", "LINEAR_SIZES"):
        sizes = getattr(gpu_stages, name)
        few = [s._replace(rows=16, hidden=16) for s in (sizes if name.endswith("S") else [sizes])]
        monkeypatch.setattr(gpu_stages, name, few if name.endswith("S") else few[0])
    for part in range(len(gpu_stages.WARM)):
        stage(tiny=False, part=part).warm()
    built = len(kernels.compiled)
    first = {}
    for name in COMPILED:
        before = set(kernels.compiled)
        runs = stage(None if name == "bandwidth" else "triton", tiny=False)
        getattr(runs, name)()
        first[name] = len(kernels.compiled - before)
    assert (built, first) == (BUILT, COMPILED)


# --- the peers ------------------------------------------------------------------------------------


def test_peers_are_fetched_for_the_machine_with_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    peers.main(["--fetch", "--wheels", str(tmp_path)])
    (command,) = commands
    assert command[3:5] == ["download", "--no-deps"]
    assert command[-3:] == list(peers.PACKAGES)
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == {p.name for p in (*peers.PEERS, *peers.LINEAR_PEERS)}
    assert lines["torch cross_entropy"] == "gives the right gradient"
    assert lines["torch linear_cross_entropy"] == "runs"
    assert lines["Liger KLDiv"].startswith("cannot be imported: ModuleNotFoundError")


def test_without_the_extension_the_gpu_goes_back(
    tmp_path: Path, stages: Callable[..., str]
) -> None:
    names = stages(
        build=fake(extension="raise SystemExit(1)", at_once=True), smoke=fake(say(backend="triton"))
    )
    left_out = "left out, the extension is not built"
    results = suite(tmp_path, "--stages", names)
    assert [e["ended"] for e in results["stages"]] == ["exit status 1", left_out]
    results = suite(tmp_path, "--stages", names, "--backends", "triton")
    assert [e["ended"] for e in results["stages"]] == ["exit status 1", "ok"]
