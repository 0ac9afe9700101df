"""The benchmarks: that what they compare is the same loss, and that their report shows what was measured."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("not in this distribution", allow_module_level=True)
sys.path.append(str(ROOT))  # last: the package under test is the installed one

from benchmarks import linear  # noqa: E402
from tnt_kernels.bench.contenders import NAIVE, forward, make_loss, training_step  # noqa: E402
from tnt_kernels.bench.oracle import check_gradient, expected  # noqa: E402
from tnt_kernels.bench.problem import Problem, Size, floor_bytes, make_problem  # noqa: E402

FLOAT32 = Size(12, 300, "float32")


def small_problem(dtype: str = "float32", ids: str = "none") -> Problem:
    problem = make_problem(FLOAT32._replace(dtype=dtype)).with_active_share(0.75)
    if ids == "a row":
        generator = torch.Generator().manual_seed(2)
        ids_ = torch.stack([torch.randperm(300, generator=generator)[:7] for _ in range(12)])
        problem = Problem(**{**vars(problem), "negative_ids": ids_})
    elif ids == "shared":
        problem = Problem(**{**vars(problem), "negative_ids": torch.arange(3, 200, 5)})
    assert {-1.0, 0.0, 1.0} == set(problem.weights.tolist())
    return problem


# --- the contenders ------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["none", "a row", "shared"])
@pytest.mark.parametrize("method", NAIVE)
@pytest.mark.parametrize("contender", ["naive", "fresh", "in place"])
def test_contenders_compute_the_reference(contender: str, method: str, ids: str) -> None:
    if contender == "naive" and method == "ul+ll" and ids != "none":
        pytest.skip("the naive UL takes the label alone")
    problem = small_problem(ids=ids)
    loss_function = make_loss(contender, method)
    loss, truth = expected(problem, method, torch.arange(12))
    torch.testing.assert_close(
        forward(loss_function, problem).double(), loss.sum(), rtol=1e-5, atol=0
    )
    gradient = training_step(loss_function, problem)
    torch.testing.assert_close(
        gradient.double(), truth, rtol=0, atol=1e-4 * float(truth.abs().max())
    )
    assert (gradient.data_ptr() == problem.logits.data_ptr()) == (contender == "in place")
    check_gradient(gradient, problem, method)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("contender", ["naive", "fresh", "in place"])
def test_contenders_in_16_bits(contender: str, dtype: str) -> None:
    problem = small_problem(dtype)
    check_gradient(training_step(make_loss(contender, "tnff"), problem), problem, "tnff")


@pytest.mark.parametrize("method", NAIVE)
def test_the_naive_losses_compile_whole(method: str) -> None:
    compiled = torch.compile(NAIVE[method], fullgraph=True, backend="aot_eager")
    problem = small_problem()
    check_gradient(training_step(compiled, problem), problem, method)


@pytest.mark.parametrize("contender", ["fused", "unfused", "naive"])
def test_linear_contenders_compute_the_reference(contender: str) -> None:
    problem = linear.make_problem(linear.LinearSize(12, 8, 300)).with_active_share(0.75)
    linear.check(linear.make_step(contender)(problem), problem)
    with pytest.raises(AssertionError, match="gradient off by"):
        linear.check(linear.Floor()(problem), problem)


def test_a_wrong_gradient_is_not_timed() -> None:
    problem = small_problem()
    gradient = training_step(make_loss("fresh", "tnff"), problem)
    with pytest.raises(AssertionError, match="gradient off by"):
        check_gradient(gradient * 1.001, problem, "tnff")
    with pytest.raises(AssertionError, match="gradient off by"):
        check_gradient(gradient, problem, "tnrf")


def test_what_has_to_move() -> None:
    tensor = 12 * 300 * 4
    assert floor_bytes(FLOAT32, "tnff", 1.0, True) == 3 * tensor
    assert floor_bytes(FLOAT32, "tnff", 1.0, False) == 2 * tensor
    assert floor_bytes(FLOAT32, "ul+ll", 1.0, True) == 2 * tensor
    assert floor_bytes(FLOAT32, "nl+ll", 1.0, True) == 2 * tensor
    assert floor_bytes(FLOAT32, "tnrf", 0.1, True) == pytest.approx(1.2 * tensor)  # (3a + 1 − a)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer takes memory of its own"
)
def test_memory_is_measured_as_the_process_has_it() -> None:
    from tnt_kernels.bench.memory import measure_in_process

    size = Size(64, 32000, "float32")
    m = measure_in_process("fresh", size, threads=1)
    assert m["known_bytes_measured"] == pytest.approx(m["known_bytes"], abs=1 << 20)
    assert m["bytes_beyond_inputs"] == pytest.approx(size.bytes, abs=1 << 20)


# --- the report ----------------------------------------------------------------------------------


@pytest.fixture
def report() -> Any:
    for package in ("pandas", "matplotlib"):
        pytest.importorskip(package, reason="needs the extra bench")
    from benchmarks import report

    return report


def measurement(seconds: float, **case: Any) -> dict[str, Any]:
    size = {"rows": 512, "vocab": 1000, "dtype": "float32"}
    stats = {"min": seconds, "median": 2 * seconds, "rounds": 3}
    return {"extra_info": {**size, **case}, "stats": stats}


def step(contender: str, seconds: float, **case: Any) -> dict[str, Any]:
    defaults = {"kind": "step", "method": "tnff", "negatives": "none", "active_share": 1.0}
    moved = {"floor_bytes": 3 * 512 * 4000, "minor_faults": 0}
    return measurement(seconds, contender=contender, **{**defaults, **moved, **case})


@pytest.fixture
def results(report: Any) -> dict[str, Any]:
    from benchmarks.results import assemble

    third = 512 * 4000  # bytes of a tensor
    allocating = [
        measurement(2e-3, kind="first touch", contender="resident", minor_faults=0),
        measurement(5e-3, kind="first touch", contender="new", minor_faults=500),
        step("fresh", 6e-3, minor_faults=500),
        step("naive", 120e-3),
    ]
    benchmarks = [
        measurement(
            3e-3, kind="bandwidth", contender="torch, over an input", floor_bytes=3 * third
        ),
        measurement(4e-3, kind="bandwidth", contender="numpy, elsewhere", floor_bytes=3 * third),
        *allocating,
        step("in place", 4e-3),
        step("compiled", 40e-3),
        step("forward", 2e-3, floor_bytes=2 * third),
        step("naive forward", 80e-3, floor_bytes=2 * third),
        step("in place", 5e-3, negatives="64 a row"),
        step("in place", 2e-3, active_share=0.1, floor_bytes=1.2 * third),
        step("in place", 8e-3, method="ul+ll", floor_bytes=2 * third),
        measurement(
            50e-3,
            kind="distances",
            paths={d: [0.5, 0.25, 0.25, 0.0] for d in ("0.1", "0.3", "1.0", "3.0")},
            by_distance={"tnff": {"0.1": 4.0, "0.3": 4.0, "1.0": 5.0, "3.0": 8.0}},
            floor_bytes=3 * third,
        ),
        measurement(
            1e-3, kind="overhead", us={"empty": 10, "fresh": 30, "in place": 50}, rows=1, vocab=8
        ),
    ]
    times = {
        "benchmarks": benchmarks,
        "datetime": "2026-01-02T03:04:05+00:00",
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "machine_info": {
            "cpu": {"brand_raw": "A CPU"},
            "system": "OS",
            "release": "1",
            "python_version": "3.x",
        },
    }
    memory = [
        {
            "contender": name,
            "rows": 512,
            "vocab": 1000,
            "dtype": "float32",
            "bytes_beyond_inputs": size,
        }
        for name, size in (("in place", 1000), ("fresh", third), ("naive", 7 * third))
    ]
    linear_size = {"hidden": 8, "vocab": 1000, "dtype": "float32", "active_share": 1.0}
    benchmarks += [
        measurement(1e-3 * n, kind="linear", contender=c, **{**linear_size, "rows": n})
        for n in (64, 128)
        for c in ("floor", "fused")
    ]
    linear_memory = [
        {
            "contender": "fused",
            "rows": n,
            "hidden": 8,
            "vocab": 1000,
            "dtype": "float32",
            "bytes_beyond_inputs": 9 << 20,
            "gradient_bytes": 1 << 20,
        }
        for n in (64, 128)
    ]  # fmt: skip
    huge = {**times, "benchmarks": allocating}
    return assemble(times, huge, memory, quick=False, linear_memory=linear_memory)


def test_ratios(results: dict[str, Any]) -> None:
    assert [b["variant"] for b in results["bandwidth"]] == ["torch, over an input"]
    cases = {
        (c["contender"], c["negatives"], c["active_share"]): c
        for c in results["cases"]
        if c["method"] == "tnff"
    }
    place = cases["in place", "none", 1]
    assert (place["ms_min"], place["ms_median"]) == (4, 8)
    assert place["fraction_of_floor"] == 0.75
    assert (place["times_naive"], place["times_compiled"]) == (30, 10)
    assert place["bytes_beyond_inputs"] == 1000
    forward_only = cases["forward", "none", 1]
    assert forward_only["fraction_of_floor"] == 1  # two of three tensors move
    assert (forward_only["times_naive"], forward_only["times_compiled"]) == (40, None)
    ids = cases["in place", "64 a row", 1]
    assert ids["times_naive"] is None
    assert ids["bytes_beyond_inputs"] is None
    assert results["page_faults"][0]["share_of_fresh_step"] == 0.5
    assert [d["ms_min"] for d in results["distances"]] == [4, 4, 5, 8]
    assert [d["fraction_of_floor"] for d in results["distances"]] == [0.75, 0.75, 0.6, 0.375]
    assert [h["contender"] for h in results["huge_pages"]] == ["resident", "new", "fresh", "naive"]


def test_targets(results: dict[str, Any], report: Any) -> None:
    from benchmarks.targets import targets

    found = {t.what: t for t in targets(results)}
    ids = found["64 a row negative ids, times the time of none"]
    assert (ids.value, ids.met) == (1.25, False)
    sparse = found["10% of rows active, share of its own floor"]
    assert sparse.value == pytest.approx(0.4 * 4 / 2)
    assert not sparse.met
    assert found["in place, share of the bandwidth"].met
    assert found["a call fresh, µs above an empty one"].value == pytest.approx(20)
    assert found["a call in place, µs above an empty one"].met is False
    assert found["4000 shared negative ids, times the time of none"].met is None
    assert found["UL and LL in place, share of the bandwidth"].value == 0.25
    assert found["NL and LL in place, share of the bandwidth"].met is None
    assert found["tnff at a distance of 1, speed over that at 0.1"].value == 0.8
    assert found["tnff at a distance of 3, speed over that at 0.1"].met is False
    assert found["tnrr at a distance of 3, speed over that at 0.1"].met is None
    assert "| **no** |" in report.target_table(results)


@pytest.fixture
def published(
    results: dict[str, Any], report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A repository with the results, the READMEs and the plot."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = tmp_path / "benchmarks" / "results" / "cpu.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))
    for file, named in report.blocks(path).items():
        begin, end = report.markers("benchmark")
        text = f"before\n{begin}\nold\n{end}\nafter\n"
        for name in named:
            if name != "benchmark":
                text += "{}\nold\n{}\n".format(*report.markers(name))
        file.write_text(text)
    report.write(path)
    return path


def test_report_shows_the_results(published: Path, report: Any) -> None:
    assert report.stale(published) == []
    begin, end = report.markers("benchmark")
    text = (published.parents[2] / "README.md").read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert f"{end}\nafter\n" in text
    assert "| tnt_loss, in place | 4 | 30× | 0.00 |" in text
    assert "(benchmarks/results/cpu.svg)" in text
    assert "| tnt_loss (cuda), in place | not measured |" in text
    full = (published.parents[1] / "README.md").read_text()
    assert "| V = 1000, float32: tnt_loss, in place | 4 | 0.75 | 30× | 10× | 0.00 |" in full
    assert "| 512 × 1000, float32, tnff | 4 | 4 | 5 | 8 | 1 | 0.8 | 0.5 | 0.375 to 0.75 |" in full
    for name in ("cpu.svg", "linear.svg"):
        plot = published.with_name(name)
        assert plot.stat().st_size < 150_000
        before = plot.read_bytes()
        report.write(published)
        assert plot.read_bytes() == before  # no date, no random ids: a diff means new figures


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "benchmarks/README.md",
        "benchmarks/results/cpu.svg",
        "benchmarks/results/linear.svg",
    ],
)
def test_report_sees_what_is_stale(published: Path, report: Any, file: str) -> None:
    path = published.parents[2] / file
    path.write_text(path.read_text().replace("30×", "40×").replace("sha256", "sha"))
    (problem,) = report.stale(published)
    assert str(path) in problem


def test_report_shows_a_gpu_s_results(published: Path, report: Any) -> None:
    case = {
        "contender": "in place", "backend": "cuda", "method": "tnff", "work": "", "negatives": "none",
        "active_share": 1.0, "rows": 8192, "vocab": 128256, "dtype": "bfloat16", "ms_min": 2.0,
        "ms_median": 2.1, "fraction_of_floor": 0.9, "bytes_beyond_inputs": 1 << 20,
        "gradient_error": 1e-3,
    }  # fmt: skip
    naive = {
        **case,
        "contender": "naive",
        "backend": None,
        "ms_min": 50.0,
        "fraction_of_floor": 0.04,
    }
    peer = {
        **naive,
        "contender": "Liger KLDiv",
        "work": "plain KL",
        "failed": "OutOfMemoryError: no",
    }
    for key in ("ms_min", "fraction_of_floor", "bytes_beyond_inputs", "gradient_error"):
        del peer[key]
    gpu = {
        "quick": False, "date": "2026-01-02T00:00:00", "commit": "0123456789", "cases": [case, naive, peer],
        "linear": [], "peers": [{"name": "quack cross_entropy", "missing": "not installed"}],
        "bandwidth": [], "machine": {"device": "A GPU"},
        "versions": {"torch": "2", "triton": "3", "tnt_kernels": "0", "python": "3"},
    }  # fmt: skip
    published.with_name("gpu.json").write_text(json.dumps(gpu))
    assert len(report.stale(published)) == 3  # both READMEs, and the plot that is not there
    report.write(published)
    assert report.stale(published) == []
    text = (published.parents[2] / "README.md").read_text()
    assert "| tnt_loss (cuda), in place | 2 | 0.9 | 1× | 1 | 1e-03 |" in text
    assert "| naive PyTorch | 50 | 0.04 | 25× | 1 | 1e-03 |" in text
    assert "| Liger KLDiv (plain KL) | OutOfMemoryError: no |" in text
    assert "| quack cross_entropy | not installed |" in text


def test_results_without_what_is_measured_since(results: dict[str, Any], report: Any) -> None:
    del results["distances"]
    assert report.distance_table(results.get("distances", ())).endswith("not measured.")
    at = "| V = 1000, float32: tnff at a distance of 1, speed over that at 0.1 |"
    assert f"{at} – | ≥ 0.7 | not measured |" in report.target_table(results)


def test_report_sees_new_results(published: Path, report: Any) -> None:
    changed = copy.deepcopy(json.loads(published.read_text()))
    for case in changed["cases"]:
        case["ms_min"] = 9
    published.write_text(json.dumps(changed))
    assert len(report.stale(published)) == 4
    changed["quick"] = True
    published.write_text(json.dumps(changed))
    assert "cpu.json is from a quick run" in report.stale(published)


@pytest.mark.parametrize("text", ["", "{0}", "{1} {0}", "{0} {1} {0} {1}"])
def test_report_needs_its_markers(report: Any, text: str) -> None:
    with pytest.raises(
        SystemExit, match=r"README\.md: expected the lines <!-- benchmark:begin -->"
    ):
        report.with_block(
            text.format(*report.markers("benchmark")), "benchmark", "block", "README.md"
        )


def test_what_fails_and_what_is_wrong_has_no_time() -> None:
    from tnt_kernels.bench.steps import Step, measure_step

    def broken(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    problem = small_problem()
    record = measure_step(Step("peer", "tnff", broken), problem, 1.0, 0.01)
    assert record["failed"] == "OutOfMemoryError: CUDA out of memory"
    other = Step("peer", "tnff", make_loss("fresh", "tnrf"))
    record = measure_step(other, problem, 1.0, 0.01)
    assert "wrong gradient" in record["failed"]
    assert "ms_min" not in record
    assert record["gradient_error"] > 1e-4


def test_jsd_truth_is_the_divergence() -> None:
    from benchmarks.peers import jsd_truth

    problem = small_problem()
    rows = torch.arange(12)
    loss, gradients = jsd_truth(problem, rows)
    p, q = (x.double().softmax(-1) for x in (problem.original, problem.ref_logits))
    m = (p + q) / 2
    direct = ((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2) / 12
    torch.testing.assert_close(loss, direct)
    assert float(gradients.sum(-1).abs().max()) < 1e-15


def test_the_naive_losses_lose_digits_near_the_reference() -> None:
    """What the accuracy table is there to show: the library keeps them."""
    from benchmarks import accuracy

    found = {
        (r["contender"], r["method"], r["distance"]): r
        for r in accuracy.measure(accuracy.Size(4, 2000, "float32"), dtypes=("float32",))
    }
    for method in ("tnff", "tnrr"):
        ours, naive = (found[c, method, 1e-4] for c in ("fresh", "naive"))
        assert ours["loss_error"] < 1e-4 < naive["loss_error"]
        assert ours["gradient_error"] < naive["gradient_error"]
        assert found["naive", method, None]["loss_error"] < 1e-5


@pytest.mark.parametrize("heads", ["shared", "apart"])
def test_the_accuracy_of_the_fused_linear_loss(heads: str) -> None:
    """Records of every case, each contender with finite errors or a reason."""
    from benchmarks import linear_accuracy as accuracy

    records = accuracy.measure(accuracy.QUICK_SIZE, heads=(heads,), kls=accuracy.QUICK_KLS)
    ours = [r for r in records if r["contender"] == "linear_tnt_loss"]
    cases = {(r["dtype"], r["method"], r["target_kl"]) for r in ours}
    assert len(ours) == len(cases) == 3 * len(accuracy.METHODS) * len(accuracy.QUICK_KLS)
    assert {r["heads"] for r in records} == {heads}
    errors = ["loss_error", "hidden_gradient_error"]
    errors += ["weight_gradient_error"] if heads == "apart" else []
    for r in records:
        assert r["target_kl"] / 2 < r["kl"] < 2 * r["target_kl"]
        assert r["contender"] in {c.name for c in accuracy.CONTENDERS}
        assert ("failed" in r) != all(0 <= r.get(name, math.nan) < math.inf for name in errors)
        assert ("weight_gradient_error" in r) == (heads == "apart" and "failed" not in r)
    for r in ours:
        assert "failed" not in r
        if r["dtype"] == "float32":
            assert max(r[name] for name in errors) < 1e-3
    naive = [r for r in records if r["contender"] == "eager"]
    assert {r["method"] for r in naive} == {"tnff"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_moved_entries_move_by_what_was_asked_for(dtype: str) -> None:
    """Also where that is less than an ulp of most of them."""
    from benchmarks.linear_accuracy import Origin

    generator = torch.Generator().manual_seed(0)
    start, noise = (torch.randn(100_000, generator=generator) for _ in range(2))
    start = start.to(getattr(torch, dtype))
    origin = Origin(start, 1.0, noise, torch.rand(100_000, generator=generator))
    for distance in (1e-1, 1e-2, 1e-3, 1e-4):
        moved = origin.moved(distance)
        assert moved.dtype == start.dtype
        change = (moved.double() - start.double()).square().mean().sqrt()
        assert 0.5 * distance < float(change) < 2 * distance
    assert int((origin.moved(torch.finfo(start.dtype).eps) == start).sum()) == 0


def test_readme_shows_the_accuracy_of_the_fused_linear_loss(report: Any) -> None:
    from benchmarks import linear_accuracy as accuracy

    results = json.loads(accuracy.PATH.read_text())
    records = results["records"]
    assert {r["method"] for r in records} == set(accuracy.METHODS)
    assert {r["target_kl"] for r in records} == set(accuracy.KLS)
    begin, end = report.markers("linear-accuracy")
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"{begin}\n{report.linear_accuracy_block(results)}\n{end}" in readme


def test_the_table_says_why_a_contender_has_no_errors(report: Any) -> None:
    case = {
        "heads": "shared", "method": "tnff", "rows": 8, "hidden": 64, "vocab": 2000, "dtype": "float32",
        "target_kl": 0.2, "kl": 0.19,
    }  # fmt: skip
    records = [
        {**case, "contender": "linear_tnt_loss", "loss_error": 1.26e-7, "hidden_gradient_error": 12.3},
        {**case, "contender": "eager", "failed": "RuntimeError: no"},
    ]  # fmt: skip
    text = report.linear_accuracy_table(records)
    assert "| shared | float32 | 1.9e-01 | 1.3e-05 / 1200 | failed |" in text
    assert text.endswith("- eager, float32, failed with RuntimeError: no")
    assert report.linear_accuracy_block(None).endswith("not measured.")


# --- instruction counts --------------------------------------------------------------------------


def test_the_kernels_take_no_more_instructions_than_committed() -> None:
    from benchmarks import instructions

    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("an instrumented build")
    if reason := instructions.why_not():
        pytest.skip(reason)
    committed = json.loads(instructions.PATH.read_text())
    if committed["compiler"] != instructions.compiler():
        pytest.skip(f"counted for {committed['compiler']}, built with {instructions.compiler()}")
    found = instructions.changes(instructions.count(), committed["per_pair"])
    assert not found, "\n".join([*found, "python -m benchmarks.instructions --write accepts this"])


def test_a_change_of_the_instruction_count_is_seen() -> None:
    from benchmarks.instructions import changes

    assert changes({"a": 10.2, "b": 9.8}, {"a": 10.0, "b": 10.0}) == []
    assert changes({"a": 10.5}, {"a": 10.0}) == ["a: 10.5 instructions a pair, committed 10.0"]
    assert changes({"a": 9.0}, {"a": 10.0}) != []
    assert changes({}, {"a": 10.0}) == ["a: None instructions a pair, committed 10.0"]


# --- the GPU kernels' machine code ---------------------------------------------------------------


def stored_slots(backend: str, **which: Any) -> list[dict[str, Any]]:
    from benchmarks import sass

    entries = json.loads(sass.PATH.read_text())["entries"]
    chosen = {"backend": backend, "arch": "sm_90", "dtype": "bfloat16", **which}
    return [e for e in entries if all(e[name] == value for name, value in chosen.items())]


def test_the_cuda_kernels_take_the_issue_slots_that_were_committed() -> None:
    """One dtype for one architecture: this compiles for half a minute."""
    from benchmarks import machine_code, sass

    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("compilers are not to be instrumented")
    if reason := sass.why_not():
        pytest.skip(reason)
    stored = json.loads(sass.PATH.read_text())
    if stored["nvcc"] != machine_code.nvcc_version():
        pytest.skip(f"counted for nvcc {stored['nvcc']}, here is {machine_code.nvcc_version()}")
    counted = sass.count_cuda(("bfloat16",), ("sm_90",))
    found = sass.changes(counted.entries, stored_slots("cuda"))
    assert not found, "\n".join([*found, "python -m benchmarks.sass --write accepts this"])
    for e in counted.entries:
        assert e["stack"] == e["spills"] == e["local"] == 0


def test_the_triton_kernels_take_the_issue_slots_that_were_committed() -> None:
    from benchmarks import sass

    if reason := sass.why_no_triton():
        pytest.skip(reason)
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted functions cannot be compiled")
    stored = json.loads(sass.PATH.read_text())["triton"]
    if stored != sass.triton_version():
        pytest.skip(f"counted for Triton {stored}, here is {sass.triton_version()}")
    counted = sass.count_triton(("sm_90",), sass.TRITON_CASES[:4])
    mine = stored_slots("triton", gradient=True, set="none", statistics=False)
    found = sass.changes(counted, mine)
    assert not found, "\n".join([*found, "python -m benchmarks.sass --write accepts this"])


def test_both_passes_keep_to_the_slots_that_they_are_to_have() -> None:
    from benchmarks import sass

    sums = sass.sums(json.loads(sass.PATH.read_text())["entries"])
    assert len(sums) == 2 * len(sass.TARGETS)
    assert not [s for s in sums if s.slots > s.target + 0.05]


def test_the_model_is_near_what_was_measured() -> None:
    """As it was when the slots were stored."""
    from benchmarks import sass

    model = json.loads(sass.PATH.read_text())["model"]
    assert model["cases"] > 50
    assert model["average"] < 0.05
    assert model["most"] < 0.15


def code_of(*lines: str) -> Any:
    """Instructions, and labels with a colon."""
    from benchmarks.machine_code import Code, Instruction

    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
            continue
        predicate, rest = line.split(" ", 1) if line.startswith("@") else ("", line)
        opcode, _, operands = rest.partition(" ")
        instructions.append(Instruction(16 * len(instructions), predicate, opcode, operands, ""))
    return Code("code", instructions, labels)


def test_paths_through_a_loop() -> None:
    """Both branches, without the wait's retry, which is a loop of its own."""
    code = code_of(
        "MOV R0, R1",
        ".L_x_0:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",
        "@!P0 BRA `(.L_x_3)",
        ".L_x_1:",
        "MUFU.EX2 R3, R3",
        "@P1 BRA `(.L_x_2)",
        "FADD R3, R3, R4",
        "FADD R3, R3, R4",
        ".L_x_2:",
        "ISETP.NE.AND P2, PT, R5, RZ, PT",
        "@P2 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_3:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",
        "@!P0 BRA `(.L_x_3)",
        "BRA `(.L_x_1)",
    )
    (loop,) = code.hot_loops(1)
    assert sorted(len(list(code.of(path))) for path in code.paths(loop)) == [6, 8]
    assert len(code.loops) == 2


def test_a_kernel_without_the_loops_that_it_should_have_is_not_counted() -> None:
    from benchmarks import sass
    from benchmarks.machine_code import Compiled

    code = code_of(".L_x_0:", *["MUFU.EX2 R3, R3"] * 8, "@P2 BRA `(.L_x_0)", "EXIT")
    with pytest.raises(RuntimeError, match="no loop for"):
        sass._kernel_entries(Compiled(code, {}), 8)
    function = "_ZN3tnt7computeILb1ELb0EEEvv_8add_nearI"
    some = [x._replace(function=function) for x in code.instructions]
    (entry,) = sass._loop_entries(type(code)("code", some, {".L_x_0": 0}), code.loops[0], 8)
    assert (entry["method"], entry["path"], entry["slots"]) == ("reverse", "near", 1.125)
    with pytest.raises(RuntimeError, match="exponentials in a turn"):
        sass._loop_entries(type(code)("code", some[1:], {".L_x_0": 0}), code.loops[0], 8)


def test_branches_of_a_converged_warp_and_jumps_by_a_table() -> None:
    code = code_of(
        'BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)',
        ".L_x_0:",
        "BRA.DIV UR4, `(.L_x_1)",
        "BRA.U UP0, `(.L_x_1)",
        "EXIT",
        ".L_x_1:",
        "EXIT",
    )
    assert [block.next for block in code.blocks] == [(1, 4), (2,), (3, 4), (), ()]


def test_a_change_of_the_slots_is_seen() -> None:
    from benchmarks import sass

    entry = dict.fromkeys(sass._KEY, "") | {"slots": 10.0}
    assert sass.changes([entry], [entry | {"slots": 10.2}]) == []
    assert len(sass.changes([entry], [entry | {"slots": 10.5}])) == 1
    assert len(sass.changes([], [entry])) == 1


def test_a_network_with_one_block_waits_for_nobody() -> None:
    from benchmarks.row_model import mva

    assert mva(1, 2.0, 3.0, 5.0) == pytest.approx(0.1)
    assert mva(1000, 2.0, 3.0, 5.0) == pytest.approx(1 / 3, rel=1e-3)
    assert mva(1.5, 2.0, 3.0, 5.0) == pytest.approx(
        (mva(1, 2.0, 3.0, 5.0) + mva(2, 2.0, 3.0, 5.0)) / 2
    )


def test_ways_of_a_row() -> None:
    """Near where no difference reaches 1; summed twice where the sums' L is far from 0."""
    from benchmarks.row_model import shares

    near = shares(False, 0.1)
    assert near.first["near"] == 1
    assert near.second == {"direct": 1}
    far = shares(True, 3.0)
    assert far.first["near"] == 0
    assert far.exchanges > 2
