"""Bad input: an error that names the argument, what came and what was expected, before anything is written."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from oracle import BACKENDS, BF16, F16, F32, F64, MISSING, NAN, Tagged, mixed_batch, run
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels import backends
from tnt_kernels._rows.checks import are_usual, check_row_tensors

N, V = 4, 9


def good(dtype: torch.dtype = F32) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "logits": torch.randn(N, V).to(dtype),
        "ref_logits": torch.randn(N, V).to(dtype),
        "labels": torch.tensor([0, 3, 8, 1]),
        "weights": torch.tensor([1.0, -1.0, 0.0, -0.5]),
    }


META = torch.device("meta")
LOGITS, LABELS, WEIGHTS = torch.zeros(N, V), torch.zeros(N, dtype=torch.int64), torch.ones(N)
TYPE, VALUE = TypeError, ValueError

#: What is wrong, the error, what its message says.
ERRORS: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"logits": [[1.0]]}, TYPE, "logits: list, expected a tensor"),
    (
        {"logits": LOGITS.long()},
        TYPE,
        "logits: dtype torch.int64, expected float32, bfloat16, float16, or float64",
    ),
    ({"logits": LOGITS * 1j}, TYPE, "logits: dtype"),
    ({"logits": torch.tensor(1.0)}, VALUE, r"logits: shape \(\), expected \(..., V\)"),
    ({"logits": torch.zeros(N, 0)}, VALUE, r"logits: shape \(4, 0\), expected .*V >= 1"),
    ({"ref_logits": None}, VALUE, "ref_logits: None, expected a tensor.*forward_kl"),
    ({"ref_logits": [1.0]}, TYPE, "ref_logits: list, expected a tensor"),
    (
        {"ref_logits": torch.zeros(N, V + 1)},
        VALUE,
        r"ref_logits: shape \(4, 10\), expected \(4, 9\)",
    ),
    ({"ref_logits": torch.zeros(1, V)}, VALUE, r"ref_logits: shape \(1, 9\), expected \(4, 9\)"),
    (
        {"ref_logits": LOGITS.half()},
        TYPE,
        "ref_logits: dtype torch.float16, expected torch.float32",
    ),
    ({"ref_logits": LOGITS.to(META)}, VALUE, "ref_logits: on meta, expected cpu"),
    (
        {"ref_logits": LOGITS.clone().requires_grad_()},
        VALUE,
        "ref_logits: requires grad, expected .*without gradient.*detach",
    ),
    ({"labels": None}, TYPE, "labels: NoneType, expected an integer tensor"),
    ({"labels": [0, 1, 2, 3]}, TYPE, "labels: list, expected an integer tensor"),
    ({"labels": torch.zeros(N)}, TYPE, "labels: dtype torch.float32, expected an integer dtype"),
    ({"labels": torch.zeros(N).bool()}, TYPE, "labels: dtype torch.bool, expected an integer"),
    ({"labels": torch.tensor([0, 1])}, VALUE, r"labels: shape \(2,\), expected \(4,\)"),
    (
        {"labels": LOGITS.long()},
        VALUE,
        r"labels: shape \(4, 9\), expected \(4,\)",
    ),
    ({"labels": LABELS.to(META)}, VALUE, "labels: on meta, expected cpu"),
    (
        {"labels": torch.tensor([0, 1, 2, V])},
        VALUE,
        "labels: row 3 has label 9, expected .*< V.*9.*ignore_index",
    ),
    (
        {"labels": torch.tensor([-1, 1, 2, 3])},
        VALUE,
        r"labels: row 0 has label -1, expected 0 <= .*\(-100\)",
    ),
    (
        {"labels": torch.tensor([0, 2**62, 2, 3])},
        VALUE,
        "labels: row 1 has label 4611686018427387904",
    ),
    (
        {"labels": torch.tensor([-100, 1, 2, 3]), "ignore_index": -1},
        VALUE,
        "labels: row 0 has label -100",
    ),
    ({"weights": [1.0] * N}, TYPE, "weights: list, expected a real tensor"),
    ({"weights": 1.0}, TYPE, "weights: float, expected a real tensor"),
    ({"weights": torch.ones(N) * 1j}, TYPE, "weights: dtype torch.complex64, expected a real"),
    ({"weights": torch.ones(N, 1)}, VALUE, r"weights: shape \(4, 1\), expected \(4,\)"),
    ({"weights": torch.tensor(1.0)}, VALUE, r"weights: shape \(\), expected \(4,\)"),
    ({"weights": WEIGHTS.to(META)}, VALUE, "weights: on meta, expected cpu"),
    ({"weights": torch.ones(N, requires_grad=True)}, VALUE, "weights: requires grad"),
    ({"method": "tnxx"}, VALUE, "method is 'tnxx', expected .*'tnff', .*'ul[+]ll'"),
    ({"method": "TNFF"}, VALUE, "method is 'TNFF'"),
    ({"method": None}, VALUE, "method is None, expected a tnt.Objective or one of"),
    ({"alpha": "1"}, TYPE, "alpha: str, expected a number"),
    ({"alpha": None}, TYPE, "alpha: NoneType, expected a number"),
    ({"alpha": True}, TYPE, "alpha: bool, expected a number"),
    ({"alpha": [1.0] * N}, TYPE, "alpha: list, expected a number"),
    ({"alpha": NAN}, VALUE, "alpha is nan, expected a finite number"),
    ({"alpha": torch.tensor(1j)}, TYPE, "alpha: dtype torch.complex64, expected a real"),
    (
        {"alpha": torch.ones(3)},
        VALUE,
        r"alpha: shape \(3,\), expected one that broadcasts to \(4,\)",
    ),
    ({"alpha": torch.ones(N, 1)}, VALUE, r"alpha: shape \(4, 1\), expected one that broadcasts"),
    ({"alpha": torch.tensor(1.0, requires_grad=True)}, VALUE, "alpha: requires grad"),
    ({"alpha": WEIGHTS.to(META)}, VALUE, "alpha: on meta, expected cpu"),
    ({"negative_ids": [1, 2]}, TYPE, "negative_ids: list, expected an integer tensor"),
    (
        {"negative_ids": torch.ones(2)},
        TYPE,
        "negative_ids: dtype torch.float32, expected an integer",
    ),
    (
        {"negative_ids": torch.ones(3, 2).long()},
        VALUE,
        r"negative_ids: shape \(3, 2\), expected \(K,\) or \(4, K\)",
    ),
    ({"negative_ids": torch.tensor(1)}, VALUE, r"negative_ids: shape \(\), expected \(K,\)"),
    ({"negative_ids": torch.ones(1, N, 2).long()}, VALUE, r"negative_ids: shape \(1, 4, 2\)"),
    ({"negative_ids": LABELS.to(META)}, VALUE, "negative_ids: on meta, expected cpu"),
    (
        {"negative_ids": torch.tensor([[0, 1]] * 3 + [[2, V]])},
        VALUE,
        "negative_ids: row 3 has id 9, expected 0 <= id < V",
    ),
    (
        {"negative_ids": torch.tensor([[0, -2]] + [[0, 1]] * 3)},
        VALUE,
        "negative_ids: row 0 has id -2, .*-1 as padding",
    ),
    ({"negative_ids": torch.tensor([0, V])}, VALUE, "negative_ids: row 0 has id 9"),
    ({"eps": -1e-6}, VALUE, "eps is -1e-06, expected a finite number of at least 0"),
    ({"eps": None}, TYPE, "eps: NoneType, expected a number"),
    ({"eps": torch.tensor(1e-6)}, TYPE, "eps: Tensor, expected a number"),
    ({"smoothing": "none"}, VALUE, "smoothing is 'none', expected 'negatives' or 'uniform'"),
    ({"nl_floor": -float("inf")}, VALUE, "nl_floor is -inf, expected a finite number"),
    ({"nl_floor": "low"}, TYPE, "nl_floor: str, expected a number"),
    ({"temperature": 0}, VALUE, "temperature is 0.0, expected a finite number above 0"),
    ({"temperature": -1.0}, VALUE, "temperature is -1.0, expected"),
    ({"temperature": NAN}, VALUE, "temperature is nan, expected"),
    ({"temperature": None}, TYPE, "temperature: NoneType, expected a number"),
    ({"ignore_index": None}, TYPE, "ignore_index: NoneType, expected an int"),
    ({"ignore_index": -100.0}, TYPE, "ignore_index: float, expected an int"),
    (
        {"reduction": "batchmean"},
        VALUE,
        "reduction is 'batchmean', expected 'mean', 'sum' or 'none'",
    ),
    ({"reduction": None}, VALUE, "reduction is None, expected"),
    (
        {"normalizer": 3, "reduction": "sum"},
        VALUE,
        "normalizer: given with reduction='sum', expected reduction='mean'",
    ),
    ({"normalizer": 3, "reduction": "none"}, VALUE, "normalizer: given with reduction='none'"),
    (
        {"normalizer": torch.ones(1)},
        VALUE,
        r"normalizer: shape \(1,\), expected a number or a 0-dim",
    ),
    ({"normalizer": -1}, VALUE, "normalizer is -1.0, expected a finite number of at least 0"),
    ({"normalizer": "3"}, TYPE, "normalizer: str, expected a number"),
    ({"normalizer": torch.tensor(2.0, requires_grad=True)}, VALUE, "normalizer: requires grad"),
    ({"normalizer": torch.tensor(2.0, device=META)}, VALUE, "normalizer: on meta, expected cpu"),
    (
        {"backend": "gpu"},
        VALUE,
        "backend is 'gpu', expected one of 'cpu', 'cuda', 'triton', 'torch'",
    ),
    ({"alhpa": 1.0}, TYPE, "alhpa"),
)


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS, ids=[case[2] for case in ERRORS])
def test_error(wrong: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    """Every one, with and without a gradient; ``inplace`` writes nothing before it."""
    for inplace, wants_grad in itertools.product((False, True), (False, True)):
        arguments = {"backend": backend, **good(), **wrong, "inplace": inplace}
        given = arguments["logits"]
        if isinstance(given, Tensor):
            if wants_grad and given.dtype.is_floating_point:
                arguments["logits"] = given.requires_grad_() * 1
            before = arguments["logits"].detach().clone()
        with pytest.raises(error, match=message) as caught:
            tnt.tnt_loss(**arguments)
        argument = next(iter(wrong))
        assert argument in str(caught.value)
        if isinstance(given, Tensor):
            assert torch.equal(arguments["logits"].detach(), before)
            assert arguments["logits"]._version == 0


def test_rows_that_do_not_count_may_hold_any_label(backend: str) -> None:
    arguments = {**good(), "labels": torch.tensor([0, 1, 2**40, 3]), "backend": backend}
    arguments["negative_ids"] = torch.tensor([[1], [-1], [-(2**40)], [2]])
    assert torch.isfinite(tnt.tnt_loss(**arguments))


def test_no_reference_is_asked_for_where_none_is_read(backend: str) -> None:
    arguments = {**good(), "ref_logits": None, "backend": backend}
    for objective in (
        "ul+ll",
        "nl+ll",
        tnt.Objective("none", "unlikelihood"),
        tnt.Objective("none", "none"),
    ):
        assert torch.isfinite(tnt.tnt_loss(**arguments, method=objective))
    for name in ("tnff", "tnfll", tnt.Objective("none", "reverse_kl")):
        with pytest.raises(ValueError, match="ref_logits: None"):
            tnt.tnt_loss(**arguments, method=name)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (("kl", "none"), "positive is 'kl', expected one of 'none', 'forward_kl'"),
        (("unlikelihood", "none"), "positive is 'unlikelihood'"),
        (
            ("none", "log_likelihood"),
            "negative is 'log_likelihood', expected one of .*'unlikelihood'",
        ),
        (("none", None), "negative is None"),
    ],
)
def test_objective(sides: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Objective: {message}"):
        tnt.Objective(*sides)


def test_module() -> None:
    with pytest.raises(
        TypeError, match="TNTLoss: unknown keyword 'alhpa', expected one of method, alpha"
    ):
        tnt.TNTLoss(alhpa=1.0)
    with pytest.raises(ValueError, match="method is 'tnxx'"):
        tnt.TNTLoss(method="tnxx")
    arguments = good()
    with pytest.raises(
        TypeError, match="TNTLoss: 'eps' at call, expected negative_ids, alpha or normalizer"
    ):
        tnt.TNTLoss()(*arguments.values(), eps=1e-3)
    with pytest.raises(TypeError, match="positional"):
        tnt.tnt_loss(*arguments.values(), "tnff")


# --- labels and ids never lead out of bounds -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("bad", [-(2**63), -(10**12), -2, -1, V, V + 1, 10**12, 2**63 - 1])
def test_a_label_out_of_range_touches_nothing(bad: int, dtype: torch.dtype, backend: str) -> None:
    for row, inplace in itertools.product((0, 1, 3), (False, True)):
        for name in ("labels", "negative_ids"):
            arguments = {**good(dtype), "negative_ids": torch.zeros(N, 2, dtype=torch.int64)}
            (arguments[name] if name == "labels" else arguments[name][:, 1])[row] = bad
            if name == "negative_ids" and bad == -1:
                continue
            logits = arguments["logits"].requires_grad_() * 1
            before = logits.detach().clone()
            arguments["logits"] = logits
            with pytest.raises(ValueError, match=f"{name}: row {row} has .* {bad}, expected 0 <="):
                tnt.tnt_loss(**arguments, inplace=inplace, backend=backend)
            assert torch.equal(logits.detach(), before)


# --- backends --------------------------------------------------------------------------------------------


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced: an error with the reason. Otherwise the next one serves."""
    monkeypatch.delenv("TNT_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(backends.cpu, "why_not", lambda logits: "no compiler was found")
    with pytest.raises(
        RuntimeError, match=r"^backend='cpu' cannot serve .*: no compiler was found"
    ):
        tnt.tnt_loss(**good(), backend="cpu")
    want = tnt.tnt_loss(**good(), backend="torch")
    assert torch.equal(tnt.tnt_loss(**good()), want)
    monkeypatch.setenv("TNT_KERNELS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"^TNT_KERNELS_BACKEND='cpu' cannot serve"):
        tnt.tnt_loss(**good())
    assert torch.equal(tnt.tnt_loss(**good(), backend="torch"), want)


def test_one_look_accepts_nothing_that_the_full_checks_would_refuse_or_change(cpu: str) -> None:
    """Each argument in many forms beside good ones, and what most calls have is accepted."""
    usual = {
        "logits": [torch.randn(N, V, dtype=dtype) for dtype in (F32, BF16, F16)]
        + [torch.randn(N, V, requires_grad=True), torch.randn(N, V + 3)[:, :V]],
        "labels": [torch.arange(N), torch.arange(3 * N)[N : 2 * N]],
        "weights": [None, torch.ones(N), torch.ones(2 * N)[N:]],
    }
    other: dict[str, list[Any]] = {
        "logits": [
            None, 1.0, [[1.0]], torch.randn(N, V).double(), torch.ones(N, V, dtype=torch.int64), torch.randn(V),
            torch.randn(N, 1, V), torch.randn(V, N).T, torch.randn(N, 2 * V)[:, ::2], torch.randn(N, 0),
            torch.randn(N, V).to(META), torch.randn(N, V).to_sparse(), torch.randn(N, V).as_subclass(Tagged),
            torch.nn.Parameter(torch.randn(N, V)), torch.randn(N, V, dtype=torch.complex64),
        ],
        "labels": [
            None, 3, torch.arange(N, dtype=torch.int32), torch.arange(N).float(), torch.arange(N + 1),
            torch.arange(2 * N)[::2], torch.arange(N).to(META), torch.tensor(1), torch.arange(N)[:, None],
            torch.arange(N).as_subclass(Tagged),
        ],
        "weights": [
            1.0, torch.ones(N).double(), torch.ones(N, dtype=torch.int64), torch.ones(N, requires_grad=True),
            torch.ones(2 * N)[::2], torch.ones(N + 1), torch.ones(N).to(META), torch.ones(N).as_subclass(Tagged),
        ],
    }  # fmt: skip
    other["ref_logits"] = [*other["logits"][1:], torch.randn(N, V, requires_grad=True)]
    plain: dict[str, Any] = {"alpha": 1.0, "negative_ids": None, "normalizer": None}

    def look(**changed: Any) -> bool:
        return are_usual(*{**tensors, **plain, **changed}.values())

    for rows, labels, weights in itertools.product(*usual.values()):
        reference = torch.randn_like(rows, requires_grad=False)
        tensors = {"logits": rows, "ref_logits": reference, "labels": labels, "weights": weights}
        assert look()
        assert look(ref_logits=None)
        for name in other:
            for value in other[name]:
                assert not look(**{name: value}), (name, value)
        for name, value in itertools.product(plain, (1, torch.tensor(1.0), torch.arange(2))):
            assert not look(**{name: value})
        checked = check_row_tensors("logits", **tensors, **plain)
        assert all(x is tensors.get(name) for name, x in checked._asdict().items())
        for wrong in (reference[:, 1:], reference[1:], reference.to(F64)):
            assert not look(ref_logits=wrong)


def test_the_compiled_kernels_serve_cpu_tensors_only(cpu: str) -> None:
    arguments = {name: x.to(META) for name, x in good().items()}
    with pytest.raises(
        RuntimeError, match=r"backend='cpu' cannot serve .*CPU tensors.*float32 on meta"
    ):
        tnt.tnt_loss(**arguments, backend=cpu)


def served_by(monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> str:
    """The backend that a call ends up with."""
    seen = []
    with monkeypatch.context() as patch:
        for name in BACKENDS:
            module = backends.BACKENDS[name]
            launch = module.launch
            patch.setattr(
                module, "launch", lambda call, n=name, f=launch: (seen.append(n), f(call))
            )
        tnt.tnt_loss(**good(), **keywords)
    assert len(seen) == 1
    return seen[0]


def test_the_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, then the environment, then the fastest."""
    fastest = next(name for name in BACKENDS if name not in MISSING)
    for environment, argument, expected in (
        (None, None, fastest),
        ("", None, fastest),
        ("torch", None, "torch"),
        ("torch", fastest, fastest),
        (fastest, "torch", "torch"),
    ):
        if environment is None:
            monkeypatch.delenv("TNT_KERNELS_BACKEND", raising=False)
        else:
            monkeypatch.setenv("TNT_KERNELS_BACKEND", environment)
        assert served_by(monkeypatch, backend=argument) == expected
    monkeypatch.setenv("TNT_KERNELS_BACKEND", "fastest")
    with pytest.raises(
        ValueError, match=r"^TNT_KERNELS_BACKEND is 'fastest', expected one of .*'torch'"
    ):
        tnt.tnt_loss(**good())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("None", "tnt_kernels._C"),
        (
            "types.SimpleNamespace(INTERFACE=-1)",
            "stale.*interface -1.*install",
        ),
    ],
    ids=["missing", "stale"],
)
def test_without_compiled_kernels(module: str, reason: str) -> None:
    """A missing or stale _C says so when it is asked for; plain PyTorch serves meanwhile."""
    script = f"""
        import sys, types
        import torch
        sys.modules["tnt_kernels._C"] = {module}
        import tnt_kernels as tnt
        from tnt_kernels import backends
        if {module} is not None:
            tnt._C = sys.modules["tnt_kernels._C"]
        z = torch.randn(3, 5)
        assert torch.isfinite(tnt.tnt_loss(z, z + 1, torch.arange(3)))
        print(backends.availability()["cpu"])
        try:
            tnt.tnt_loss(z, z, torch.arange(3), backend="cpu")
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    why, error = done.stdout.splitlines()
    assert why
    assert re.search(reason, why) or module == "None"
    assert error == f"backend='cpu' cannot serve these logits: {why}"


def test_instruction_sets_by_name(cpu: str) -> None:
    from tnt_kernels import _C

    before = _C.selected_instruction_set()
    assert before == _C.instruction_sets()[-1]
    with pytest.raises(ValueError, match="instruction set is 'mmx', expected one of: baseline"):
        _C.select_instruction_set("mmx")
    assert _C.selected_instruction_set() == before


def test_a_failed_call_leaves_the_next_one_alone(backend: str) -> None:
    batch = mixed_batch(20)
    want = run(batch, backend)
    with pytest.raises(ValueError, match="labels"):
        tnt.tnt_loss(**{**good(), "labels": torch.full((N,), V)}, backend=backend)
    got = run(batch, backend)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradient, want.gradient)
