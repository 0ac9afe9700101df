"""The command line: ``tnt-kernels info | demo | bench``, also as ``python -m tnt_kernels``."""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

import tnt_kernels.backends.cuda as cuda
from tnt_kernels import _build_info
from tnt_kernels._version import __version__
from tnt_kernels.backends import availability


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: the process's) and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="tnt-kernels", description="Fused kernels for targeted negative training."
    )
    parser.add_argument("--version", action="version", version=f"tnt_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser(
        "info", help="what is installed, what runs here, and why the rest does not"
    )
    about.add_argument(
        "--gpu", action="store_true", help="also how the CUDA kernels spread rows over each GPU"
    )
    # These two have parsers of their own, which answer --help.
    commands.add_parser(
        "demo", add_help=False, help="train a model towards its own minimal targeted update"
    )
    commands.add_parser(
        "bench", add_help=False, help="speed and memory against plain PyTorch, in two minutes"
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        return _demo(rest)
    if arguments.command == "bench":
        return int(import_module("tnt_kernels.bench.cli").main(rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for key, value in [*info(), *(plans() if arguments.gpu else [])]:
        print(f"{key:<18} {value}")
    return 0


def info() -> list[tuple[str, str]]:
    """What is installed and what runs here, as pairs of a heading and a line of text."""
    return [
        ("tnt_kernels", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("Triton", _installed("triton")),
        ("GPU", _gpu()),
        *((f"backend {name}", why or "available") for name, why in availability().items()),
        *_native(),
    ]


#: Of Llama 2, GPT-2, Llama 3, Qwen and Gemma.
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)


def plans() -> list[tuple[str, str]]:
    """How the CUDA kernel that reads each logit once spreads rows over every GPU here, as lines of ``info``."""
    if why := cuda.why_not(None):
        return [("rows on a GPU", f"not known: {why}")]
    lines = []
    for index in range(torch.cuda.device_count()):
        lines.append((f"cuda:{index}", torch.cuda.get_device_name(index)))
        for dtype, vocab in itertools.product((torch.bfloat16, torch.float32), VOCABULARIES):
            key = f"{str(dtype).removeprefix('torch.')} {vocab}"
            lines.append((key, describe_plan(cuda.plan(dtype, vocab, True, index))))
    return lines


def describe_plan(plan: cuda.Plan) -> str:
    if plan.blocks == 0:
        return "read twice, by another kernel"
    blocks = f"{plan.blocks} block{'s' if plan.blocks > 1 else ''} of {plan.threads} threads a row"
    return f"{blocks}, {plan.shared_bytes / 1024:.1f} KiB each; {plan.rows} rows at a time"


def _native() -> list[tuple[str, str]]:
    """The facts of ``_C``, which a pure-Python installation lacks."""
    build = _build_info.load()
    try:
        from tnt_kernels import _C
    except ImportError as error:
        return [("native kernels", f"none: {build.native_missing or error}")]
    threads = torch.get_num_threads() if _C.openmp() else 1
    lines = [
        ("native kernels", f"_C {_C.version}, compiler {_C.compiler}"),
        ("instruction sets", f"built: {', '.join(build.instruction_sets)}"),
        ("", f"run here: {', '.join(_C.instruction_sets())}"),
        ("", f"selected: {_C.selected_instruction_set()}"),
        ("OpenMP", f"{threads} threads" if _C.openmp() else "built without: one thread"),
    ]
    cuda = "none: " + build.cuda_missing if build.cuda_missing else "compiled for "
    lines.append(("CUDA kernels", cuda + ", ".join(build.cuda_architectures)))
    if build.sanitize:
        lines.append(("sanitizers", build.sanitize))
    return lines


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _demo(arguments: list[str]) -> int:
    try:
        demo = import_module("tnt_kernels.demo")
    except ImportError as error:  # says which package is missing and how to install it
        print(error, file=sys.stderr)
        return 1
    return int(demo.main(arguments))
