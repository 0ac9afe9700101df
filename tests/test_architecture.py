"""The shape of the package: which module may import which, and how far a call is from its kernel."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import tnt_kernels as tnt

PACKAGE = Path(tnt.__file__).parent
#: From the ground up: a module imports its own layer and those before. The rest of the package stands on all of them.
LAYERS = (
    ("_version", "_build_info", "_C", "objectives", "annotate"),
    ("_scalars",),
    ("_call",),
    ("backends",),
    ("_rows",),
    ("_sharded",),
    ("_operators",),
    ("_linear",),
    ("_autograd",),
    ("functional",),
    ("linear",),
    ("losses",),
    ("hf",),
)


def modules() -> dict[str, Path]:
    found = {}
    for path in (*PACKAGE.rglob("*.py"), PACKAGE / "_C.pyi"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def test_imports_run_one_way() -> None:
    """No circle, imports inside of functions included; and no module imports a layer above its own."""
    known = modules()
    assert len(known) > 50
    graph = {name: imports(path, known) for name, path in known.items()}
    graph["tnt_kernels._C"] = set()  # its stub names types alone
    list(graphlib.TopologicalSorter(graph).static_order())  # raises for a circle
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}

    def layer(module: str) -> int:
        parts = module.split(".")
        return level.get(parts[1], len(LAYERS)) if len(parts) > 1 else len(LAYERS)

    upwards = [(a, b) for a, targets in graph.items() for b in targets if layer(b) > layer(a)]
    assert not upwards


def test_backends_stand_alone() -> None:
    """One knows nothing of another, and none of autograd. ``native`` is what two of them have in common."""
    known = modules()
    common = {"tnt_kernels.backends.protocol", "tnt_kernels.backends.native"}
    for name, path in known.items():
        parts = name.split(".")
        if len(parts) < 3 or parts[1] != "backends":
            continue
        own = ".".join(parts[:3])
        others = {x for x in imports(path, known) if x.startswith("tnt_kernels.backends")} - common
        assert all(x == own or x.startswith(f"{own}.") for x in others), (name, others)
        assert "torch.autograd" not in path.read_text(), name


def test_the_oracle_shares_no_line_with_a_backend() -> None:
    known = modules()
    oracle = "tnt_kernels.reference"
    assert imports(known[oracle], known) == {"tnt_kernels.objectives"}
    users = {name for name, path in known.items() if oracle in imports(path, known)}
    assert users == {"tnt_kernels.bench.oracle"}


def test_levels_from_the_public_function_to_the_kernel(
    cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most six Python frames, PyTorch's own ``Function.apply`` among them."""
    from tnt_kernels import _C

    kernel, found = _C.run_rows, []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "c_call" and argument is kernel:
            names = []
            while frame.f_code is not test_levels_from_the_public_function_to_the_kernel.__code__:
                names.append(frame.f_code.co_name)
                assert frame.f_back is not None
                frame = frame.f_back
            found.append(names)

    z, r = torch.randn(2, 3, 5)
    labels, weights = torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, -1.0, 1.0])
    leaf = z.requires_grad_()
    for keywords in ({}, {"inplace": True}, {"reduction": "none"}, {"return_stats": True}):
        logits = leaf * 1
        sys.setprofile(watch)
        try:
            tnt.tnt_loss(logits, r, labels, weights, backend=cpu, **keywords)
        finally:
            sys.setprofile(None)
    assert len(found) == 4
    assert all(len(names) <= 6 and names[-1] == "tnt_loss" for names in found), found
