"""The installation that the tests run on, and builds of this tree as elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import tnt_kernels
from tnt_kernels import _build_info

ROOT = Path(__file__).parents[1]


def run(
    code: str, cwd: Path | None = None, *flags: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- This installation ----------------------------------------------------------------------------


def test_one_version():
    assert version("tnt_kernels") == tnt_kernels.__version__
    native = pytest.importorskip("tnt_kernels._C")
    assert native.version == tnt_kernels.__version__


def test_the_build_is_recorded():
    build = _build_info.load()
    try:
        from tnt_kernels import _C
    except ImportError:
        assert build.native_missing
        return
    assert build.native_missing == ""
    assert build.openmp == _C.openmp()
    here = _C.instruction_sets()  # those of the build that this machine has too
    assert list(here) == [isa for isa in build.instruction_sets if isa in here]
    assert here[0] == "baseline"


def test_an_installation_without_a_record_is_no_error(tmp_path):
    assert "pip install" in _build_info.load(tmp_path / "absent.json").native_missing


def test_types_are_shipped():
    assert (Path(tnt_kernels.__file__).parent / "py.typed").exists()


PROBE = """
import json, sys
import torch
before = set(sys.modules)
import tnt_kernels
modules = sorted(set(sys.modules) - before)
try:
    import tnt_kernels._C
except ImportError:
    pass
import numpy
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps({
    "modules": modules,
    "maps": maps,
    "subnormals": bool(numpy.float32(1e-40) * numpy.float32(1) > 0),
}))
"""


@pytest.fixture(scope="module")
def fresh_process():
    """What a process looks like after the import; one process, as importing torch takes seconds."""
    result = run(PROBE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_leaves_the_heavy_packages_alone(fresh_process):
    loaded = {name.partition(".")[0] for name in fresh_process["modules"]}
    assert "tnt_kernels" in loaded
    assert not loaded & {
        "triton",
        "transformers",
        "accelerate",
        "matplotlib",
        "pandas",
        "tokenizers",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_process_has_one_openmp_runtime(fresh_process):
    """That is torch's: ``_C`` asks for libgomp.so.1, which torch has loaded by then."""
    library = re.compile(r"\S*/lib(?:gomp|omp|iomp)[^/\s]*$", re.MULTILINE)
    runtimes = set(library.findall(fresh_process["maps"]))
    assert len(runtimes) == 1, runtimes
    assert "/torch" in runtimes.pop()


def test_subnormals_survive_the_import(fresh_process):
    """A library linked with -ffast-math sets flush-to-zero for the whole process."""
    assert fresh_process["subnormals"]


# --- Builds of this tree --------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A copy of what is tracked, without what builds leave."""
    left_behind = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "*.so", "_build_info.json", "__pycache__"
    )
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=left_behind)


def build(tree: Path, kind: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds into ``tree/dist`` the way pip does, but without isolation."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}('dist')"
    # Not the CUDA kernels: those take minutes, and another time shows nothing new.
    return run(code, tree, **{"TNT_KERNELS_SKIP_CUDA_BUILD": "1", **environment})


def built_wheel(tree: Path) -> zipfile.ZipFile:
    (wheel,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_source_distribution_builds_what_the_tree_does(tree):
    result = build(tree, "sdist")
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.*")}
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".json"))]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nowhere/c++"}, "no C++ compiler"),
        ({"CXX": "c++", "PATH": "/nowhere"}, "no C++ compiler"),
        ({"TNT_KERNELS_SKIP_CPU_BUILD": "1"}, "TNT_KERNELS_SKIP_CPU_BUILD"),
    ],
    ids=["no CXX", "nothing on PATH", "skipped"],
)
def test_python_alone_is_built_and_records_what_is_missing(tree, environment, reason):
    result = build(tree, "wheel", **environment)
    assert result.returncode == 0, result.stderr
    assert "WITHOUT native kernels" in result.stderr
    with built_wheel(tree) as wheel:
        names = wheel.namelist()
        record = json.loads(wheel.read("tnt_kernels/_build_info.json"))
    assert "tnt_kernels/py.typed" in names
    assert not [name for name in names if name.endswith(".so") or name.startswith("tests/")]
    assert reason in record["native_missing"]


def test_python_alone_runs(tree):
    assert build(tree, "wheel", CXX="/nowhere/c++").returncode == 0
    installed = tree / "installed"
    with built_wheel(tree) as wheel:
        wheel.extractall(installed)
    # Without site, or the finder of an editable installation would lend its _C to this package.
    path = os.pathsep.join([str(installed), str(Path(torch.__file__).parents[1])])
    code = "from tnt_kernels.cli import main; main(['info'])"
    info = run(code, installed, "-S", PYTHONPATH=path)
    assert info.returncode == 0, info.stderr
    assert "none: no C++ compiler" in info.stdout


def test_a_compiler_that_fails_is_an_error(tree):
    result = build(tree, "wheel", CXX="false")
    assert result.returncode != 0
    assert "TNT_KERNELS_SKIP_CPU_BUILD=1" in result.stderr


# --- CUDA: with compilers that only say what they were asked ---------------------------------------


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA_HOME whose nvcc, and a C++ compiler, that write down their arguments and leave empty objects."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart_static.a").touch()
    script = """#!/bin/sh
echo "$@" >> "$0.log"
while [ $# -gt 0 ]; do
    case "$1" in -o) mkdir -p "$(dirname "$2")"; echo > "$2";; esac
    shift
done
"""
    for name in ("nvcc", "c++"):
        tool = home / "bin" / name
        tool.write_text(script)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return home


def build_for_cuda(tree, toolkit, **environment):
    """(result, the record of what was built)."""
    defaults = {
        "CXX": str(toolkit / "bin" / "c++"), "CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "",
        "TNT_KERNELS_SKIP_CUDA_BUILD": "0", "TNT_KERNELS_FORCE_CUDA_BUILD": "0",
    }  # fmt: skip
    result = build(tree, "wheel", **{**defaults, **environment})
    if result.returncode:
        return result, None
    with built_wheel(tree) as wheel:
        return result, json.loads(wheel.read("tnt_kernels/_build_info.json"))


@pytest.mark.parametrize(
    ("listed", "built", "flags"),
    [
        ("", ["8.0", "9.0", "10.0+PTX"], ["80,code=sm_80", "90,code=sm_90", "100,code=sm_100", "100,code=compute_100"]),
        ("8.6 9.0a", ["8.6", "9.0a"], ["86,code=sm_86", "90a,code=sm_90a"]),
    ],
)  # fmt: skip
def test_nvcc_is_asked_for_these_architectures(tree, toolkit, listed, built, flags):
    result, record = build_for_cuda(
        tree, toolkit, TORCH_CUDA_ARCH_LIST=listed, TNT_KERNELS_FORCE_CUDA_BUILD="1", MAX_JOBS="3"
    )
    assert result.returncode == 0, result.stderr
    assert record["cuda_missing"] == ""
    assert record["cuda_architectures"] == built
    asked = (toolkit / "bin" / "nvcc.log").read_text().splitlines()
    asked.remove("--help")  # for what it can compress
    sources = {re.search(r"-c (\S+)", line)[1] for line in asked}
    assert sources == {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu")}
    assert len(asked) == len(sources)
    for line in asked:
        assert re.findall(r"-gencode=arch=compute_(\S+)", line) == flags
    linked = (toolkit / "bin" / "c++.log").read_text().splitlines()[-1]
    assert f"-L{toolkit}/lib64 -lcudart_static" in linked


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TNT_KERNELS_SKIP_CUDA_BUILD": "1"}, "TNT_KERNELS_SKIP_CUDA_BUILD was set"),
        ({"CUDA_HOME": "/nowhere"}, "no nvcc at installation (CUDA_HOME"),
    ],
    ids=["skipped", "no nvcc"],
)
def test_without_cuda_the_record_says_why(tree, toolkit, environment, reason):
    result, record = build_for_cuda(tree, toolkit, **environment)
    assert result.returncode == 0, result.stderr
    assert reason in record["cuda_missing"]
    assert record["cuda_architectures"] == []
    assert record["native_missing"] == ""
    assert not (toolkit / "bin" / "nvcc.log").exists()


def test_an_nvcc_that_fails_is_an_error(tree, toolkit):
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho unsupported GNU version >&2; exit 1\n")
    result, _ = build_for_cuda(tree, toolkit)
    assert result.returncode != 0
    assert "unsupported GNU version" in result.stderr
    assert "TNT_KERNELS_SKIP_CUDA_BUILD=1" in result.stderr


def test_a_forced_cuda_build_without_nvcc_is_an_error(tree, toolkit):
    forced = {"CUDA_HOME": "/nowhere", "TNT_KERNELS_FORCE_CUDA_BUILD": "1"}
    result, _ = build_for_cuda(tree, toolkit, **forced)
    assert result.returncode != 0
    assert "TNT_KERNELS_FORCE_CUDA_BUILD is set" in result.stderr


@pytest.mark.parametrize(
    ("listed", "message"), [("7.5 9.0", "need 8.0 or later"), ("sm_90", "expected one like 9.0")]
)
def test_architectures_that_cannot_be_are_an_error(tree, toolkit, listed, message):
    result, _ = build_for_cuda(tree, toolkit, TORCH_CUDA_ARCH_LIST=listed)
    assert result.returncode != 0
    assert message in result.stderr
