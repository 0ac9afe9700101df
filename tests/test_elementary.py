"""The functions that the CPU kernels' rows are made of, against NumPy's extended precision, by instruction set."""

from __future__ import annotations

import ast
import ctypes
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compiled import ROOT, compiled
from numpy.typing import NDArray
from oracle import instruction_sets

Numbers = NDArray[np.float64]
EPS, INF, NAN = 2.0**-24, math.inf, math.nan


def flags_of(name: str) -> list[str]:
    """Of setup.py, for an instruction set."""
    wanted = {"CXX_FLAGS", "INSTRUCTION_SETS"}
    tree = ast.parse((ROOT / "setup.py").read_text())
    found: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in wanted:
            exec(compile(ast.Module([node], []), "setup.py", "exec"), found)
    flags, sets = found["CXX_FLAGS"], found["INSTRUCTION_SETS"]
    assert isinstance(flags, list)
    assert isinstance(sets, dict)
    return [*flags, *sets.get(name, [])]


@pytest.fixture(scope="module", params=instruction_sets())
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    name = request.param
    source = ROOT / "tests" / "elementary.cpp"
    sources = [source, *sorted((ROOT / "csrc").rglob("*.h"))]
    arguments = [*flags_of(name), "-fopenmp-simd", f"-DTNT_ISA={name}", str(source)]
    return ctypes.CDLL(str(compiled(f"tnt_elementary_{name}", arguments, sources)))


def apply(library: ctypes.CDLL, name: str, x: Numbers) -> Numbers:
    x = np.ascontiguousarray(x, dtype=np.float64)
    y = np.empty_like(x)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (x, y))
    assert library.apply(name.encode(), *pointers, ctypes.c_int64(len(x))) == 0
    return y


def floats(low: float, high: float, count: int = 20001) -> Numbers:
    """Between the two, and next to 0 at every size that a float has."""
    x = np.linspace(low, high, count).astype(np.float32).astype(np.float64)
    small = 2.0 ** np.arange(-60, 0)
    small = np.concatenate((small, -small))
    return np.concatenate((x, small[(small >= low) & (small <= high)]))


def phi(x: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    series = np.zeros_like(x)
    for k in range(24, 1, -1):
        series = (series * x + 1) / k if k > 2 else (series * x + 1) / 2
    return np.where(np.abs(x) < 0.5, x * x * series, np.expm1(x) - x)


def sinh_ratio(square: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    """2 sinh(y/2) / y of y's square."""
    y = np.sqrt(square)
    return np.where(square < 1e-12, 1 + square / 24, 2 * np.sinh(y / 2) / np.where(y == 0, 1, y))


#: Name, range, truth, relative error: what the functions' comments state, and roundings on the way.
FUNCTIONS: dict[str, tuple[Numbers, Callable, float]] = {
    "exponential": (floats(-126, 127), np.exp2, 1.6e-7 + EPS),
    "power": (floats(-126, 127), np.exp2, 1.6e-7 + EPS),
    "short power": (floats(-126, 127), np.exp2, 2.7e-6 + EPS),
    "logarithm": (2.0 ** floats(-148, 127), np.log, 2e-7 + EPS),
    "expm1": (floats(-15.9, 15.9), np.expm1, 7e-7),
    "phi": (floats(-15.9, 15.9), phi, 7e-7),
    "phi_near": (floats(-1, 1), phi, 1.7e-7 + 2 * EPS),
    "phi_wide": (floats(-4, 4), phi, 6e-7),
    "phi_wide double": (floats(-4, 4), phi, 2e-15),
    "sinh_ratio_near": (floats(0, 1.25**2), sinh_ratio, 6e-8 + 2 * EPS),
    "sinh_ratio_wide": (floats(0, 144), sinh_ratio, 6e-8 + 3 * EPS),
    "expm1 double": (floats(-15.9, 15.9), np.expm1, 1e-15),
    "phi double": (floats(-15.9, 15.9), phi, 2e-15),
    "phi of a logarithm": (floats(-3, 3), phi, 1e-12),
    "softplus": (floats(-700, 700), lambda x: np.logaddexp(x, 0), 1e-15),
    "sinh_ratio_near double": (floats(0, 1.25**2), sinh_ratio, 1e-15),
    "sinh_ratio_wide double": (floats(0, 144), sinh_ratio, 2e-15),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(library: ctypes.CDLL, name: str) -> None:
    x, truth_of, bound = FUNCTIONS[name]
    x = x if "double" in name or "of a" in name else x.astype(np.float32).astype(np.float64)
    y, truth = apply(library, name, x), truth_of(x.astype(np.longdouble))
    error = np.abs(y - truth) / np.maximum(np.abs(truth), np.finfo(np.float32).tiny)
    worst = int(np.argmax(np.nan_to_num(error, nan=INF)))
    assert error[worst] <= bound, (x[worst], y[worst], float(truth[worst]), float(error[worst]))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("exponential", {0.0: 1.0, -INF: 0.0, -128.0: 0.0, -1e38: 0.0, NAN: NAN}),
        ("power", {-INF: 0.0, -151.0: 0.0, -1e38: 0.0, 129.0: INF, INF: INF, NAN: NAN}),
        ("logarithm", {0.0: -INF, 1.0: 0.0, INF: INF, -1.0: NAN, NAN: NAN}),
        ("softplus", {INF: INF, -INF: 0.0, NAN: NAN}),
        ("phi", {0.0: 0.0}),
        ("phi_near", {0.0: 0.0}),
        ("phi_wide", {0.0: 0.0}),
        ("phi of a logarithm", {0.0: 0.0}),
        ("sinh_ratio_near", {0.0: 1.0}),
    ],
)  # fmt: skip
def test_known_values(library: ctypes.CDLL, name: str, known: dict[float, float]) -> None:
    np.testing.assert_array_equal(apply(library, name, np.array(list(known))), list(known.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storing(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """To the nearest, a tie to the even one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.cat((torch.randn(5000, generator=generator), 2.0 ** torch.arange(-14, 15)))
    found = torch.from_numpy(
        apply(library, f"stored as {str(dtype).removeprefix('torch.')}", x.double().numpy())
    )
    assert torch.equal(found, x.to(dtype).double())
    tie = np.array([1 + 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-11])
    expected = torch.from_numpy(tie).to(dtype).double().numpy()
    name = f"stored as {str(dtype).removeprefix('torch.')}"
    np.testing.assert_array_equal(apply(library, name, tie), expected)
    away = 1 + 2.0**-7  # where even and odd entries go side by side, a tie goes away from 0
    np.testing.assert_array_equal(apply(library, "stored as loaded", tie), [away, -away, 1.0])


def test_folds(library: ctypes.CDLL) -> None:
    n = library.vector_floats()
    generator = np.random.default_rng(0)
    for _ in range(100):
        x = generator.normal(size=n).astype(np.float32)
        total, top = ctypes.c_double(), ctypes.c_double()
        library.folds(x.ctypes.data_as(ctypes.c_void_p), ctypes.byref(total), ctypes.byref(top))
        assert total.value == pytest.approx(float(x.astype(np.longdouble).sum()), rel=1e-12)
        assert top.value == float(x.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_left_out(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    n = 4 * library.vector_floats()
    generator = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        for _ in range(50):
            x = torch.from_numpy(generator.normal(size=n)).to(dtype).float().numpy()
            chosen = generator.random(n) < share
            bits = sum(1 << i for i in np.flatnonzero(chosen).tolist())
            left = np.empty(n, np.float32)
            pointers = (a.ctypes.data_as(ctypes.c_void_p) for a in (x, left))
            library.leave_out(dtype == torch.bfloat16, ctypes.c_uint64(bits), *pointers)
            np.testing.assert_array_equal(left, np.where(chosen, 0, x))


def test_log_add(library: ctypes.CDLL) -> None:
    library.log_add.restype = ctypes.c_double
    library.log_add.argtypes = (ctypes.c_double, ctypes.c_double)
    cases = {
        (0.0, 0.0): math.log(2), (-INF, -INF): -INF, (3.0, -INF): 3.0, (-INF, -1e30): -1e30, (1e30, 1.0): 1e30,
        (-1e4, -1e4): -1e4 + math.log(2),
    }  # fmt: skip
    for (a, b), expected in cases.items():
        for found in (library.log_add(a, b), library.log_add(b, a)):
            assert found == pytest.approx(expected, rel=1e-15)
    assert math.isnan(library.log_add(NAN, 0.0))
    assert math.isnan(library.log_add(-INF, NAN))
