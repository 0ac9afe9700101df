"""Issue slots of the GPU kernels per pair of logits, counted in their machine code: no GPU is needed.

``python -m benchmarks.sass`` compiles the kernels of KL rows for two GPUs, follows every path through their loops,
prints what a pair takes next to ``results/sass.json``, and predicts times (row_model.py). ``--write`` stores all of it.
The figures hold for one nvcc and one Triton. A slot is one instruction of a warp for 32 pairs, a lane each; an
instruction that is predicated off takes its slot too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine_code, row_model
from benchmarks.machine_code import Code, Compiled, Instruction, Loop

PATH = Path(__file__).parent / "results" / "sass.json"
ROOT = Path(__file__).parent.parent
#: As benchmarks.instructions has it: an instruction in a loop of 60 shows.
TOLERANCE = 0.03
ARCHITECTURES = ("sm_90", "sm_100")
#: Sources of csrc/cuda, one a dtype of logits and of gradient: columns that a thread takes at once.
GROUPS = {"bfloat16": 8, "float16": 8, "float32": 4, "float32_bfloat16": 4}

#: Of which dtypes the kernels are counted that also take the statistics.
STATISTICS = ("bfloat16",)

#: Which of the source's functions a path goes through, and how many exponentials a pair that takes.
EXPONENTIALS = {
    ("first", "near"): 1, ("first", "middle"): 2, ("first", "far"): 2,
    ("first", "likelihood"): 1, ("second", "likelihood"): 1,
    ("forward", "near"): 1, ("forward", "direct"): 2, ("forward", "far"): 2,
    ("reverse", "near"): 1, ("reverse", "direct"): 1, ("reverse", "far"): 1,
}  # fmt: skip
_FIRST = {"add_near": "near", "add_middle": "middle", "add_far": "far"}
_SECOND = {"near_gradient": "near", "direct_gradient": "direct", "far_gradient": "far"}
_COMPUTE = re.compile(r"7computeILb([01])ELb([01])E")
_LIKELIHOOD = "18compute_likelihood"

#: The most slots a pair of both passes, bfloat16, sm_90, rows and gradient aligned: what the kernels are to keep to.
TARGETS = {
    ("cuda", "forward", "near"): 34.0, ("cuda", "reverse", "near"): 30.0,
    ("cuda", "forward", "middle"): 39.0, ("cuda", "reverse", "middle"): 39.0,
    ("cuda", "forward", "far"): 50.0, ("cuda", "reverse", "far"): 50.0,
    ("triton", "forward", "any"): 31.0, ("triton", "reverse", "any"): 30.0,
}  # fmt: skip
#: And how many more where rows begin anywhere.
MISALIGNED = {"cuda": 6.0, "triton": 3.0}

Entry = dict[str, Any]
_KEY = (
    "backend",
    "arch",
    "dtype",
    "statistics",
    "gradient",
    "method",
    "pass",
    "path",
    "aligned",
    "set",
    "copy",
)


def key_of(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={entry[name]}" for name in _KEY)


def why_not() -> str:
    """Why CUDA's cannot be counted here; empty where they can."""
    missing = [name for name in ("nvcc", "ptxas", "nvdisasm") if not machine_code.tool(name)]
    return f"no {', '.join(missing)}" if missing else ""


def why_no_triton() -> str:
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    return "" if machine_code.tool("nvdisasm") else "no nvdisasm"


def triton_version() -> str:
    import triton

    return str(triton.__version__)


# ------------------------------------------------------------------------------------------------------------ CUDA


def _functions(instructions: Iterable[Instruction], names: Iterable[str]) -> Counter[str]:
    """How many instructions were inlined from each of these functions."""
    words = {name: re.compile(rf"(?<!\d){len(name)}{name}(?=[IERKf])") for name in names}
    found: Counter[str] = Counter()
    for x in instructions:
        for name, word in words.items():
            if word.search(x.function):
                found[name] += 1
    return found


class _Kind(NamedTuple):
    method: str
    set: bool
    stores: str  # "", "vectors", "entries"


def _kind(code: Code, loop: Loop) -> _Kind:
    """Of a loop, by the functions that its instructions were inlined from."""
    body = list(code.of(loop.blocks))
    found = Counter(m.groups() for x in body if (m := _COMPUTE.search(x.function)))
    likelihood = sum(_LIKELIHOOD in x.function for x in body)
    stores = [x for x in body if x.name == "STG"]
    wide = any(word in x.opcode for x in stores for word in (".128", ".64"))
    how = "vectors" if wide else "entries" if stores else ""
    if likelihood > sum(found.values()):
        return _Kind("likelihood", True, how)
    if len(found) != 1:
        raise RuntimeError(
            f"a loop of {code.name} belongs to {dict(found)}: expected one compute<>"
        )
    ((reverse, with_set),) = found
    return _Kind("reverse" if reverse == "1" else "forward", with_set == "1", how)


def _loops_over_rows(code: Code, group: int) -> list[Loop]:
    """The hot loops; others with as many exponentials merge a set's sums."""
    found = []
    for loop in code.hot_loops(group):
        body = list(code.of(loop.blocks))
        rows = sum(_functions(body, (*_FIRST, *_SECOND)).values())
        sets = sum("9KlSetSums" in x.function or "judge" in x.function for x in body)
        if rows >= group or sum(_LIKELIHOOD in x.function for x in body) > sets:
            found.append(loop)
    return found


def _loop_entries(code: Code, loop: Loop, group: int) -> list[Entry]:
    """An entry for each path, the longest of those that do the same."""
    kind = _kind(code, loop)
    which = "second" if kind.stores else "first"
    names = _SECOND if kind.stores else _FIRST
    found: dict[tuple[str, str], list[tuple[int, list[Instruction]]]] = {}
    for path in code.paths(loop):
        body = list(code.of(path))
        if kind.method == "likelihood":
            label = "likelihood"
        else:
            votes = _functions(body, names).most_common(1)
            if not votes or votes[0][1] < group:
                raise RuntimeError(f"a path of {code.name} computes none of {', '.join(names)}")
            label = names[votes[0][0]]
        each = EXPONENTIALS[
            which if label == "likelihood" or which == "first" else kind.method, label
        ]
        exponentials = sum(x.is_exponential for x in body)
        pairs, rest = divmod(exponentials, each)
        if rest or pairs % group or not pairs:
            raise RuntimeError(
                f"{code.name}: {exponentials} exponentials in a turn of the {kind.method} {which} pass, {label}; "
                f"expected {each} a pair and {group} pairs, or a multiple"
            )
        here = ""
        if kind.set:
            selected = sum(
                x.name in ("SEL", "FSEL", "USEL") and ("6remove" in x.function or "8gradientI" in x.function)
                for x in body
            )  # fmt: skip
            here = (
                "in the group" if kind.method == "likelihood" or selected >= group else "elsewhere"
            )
        found.setdefault((label, here), []).append((pairs, body))
    entries = []
    for (label, here), bodies in found.items():
        pairs, body = max(bodies, key=lambda x: len(x[1]))
        entries.append(
            {
                "method": kind.method,
                "pass": which,
                "path": label,
                "aligned": kind.stores != "entries",
                "set": here or "none",
                "slots": round(len(body) / pairs, 3),
                "local": sum(x.name in ("LDL", "STL") for x in body),
                "pairs": pairs,
                "classes": machine_code.classes(body, pairs),
            }
        )
    return entries


def _expected(direct: bool) -> set[tuple[str, str, str, bool]]:
    """(method, pass, path, aligned) of all that a kernel's loops must hold."""
    found = {("likelihood", "first", "likelihood", True)}
    found |= {("likelihood", "second", "likelihood", aligned) for aligned in (True, False)}
    for method in ("forward", "reverse"):
        found |= {(method, "first", path, True) for path in _FIRST.values()}
        for path in ("near", "far", *(["direct"] if direct else [])):
            found |= {(method, "second", path, aligned) for aligned in (True, False)}
    return found


def _kernel_entries(kernel: Compiled, group: int) -> list[Entry]:
    code = kernel.code
    entries = [
        e for loop in _loops_over_rows(code, group) for e in _loop_entries(code, loop, group)
    ]
    for with_set in (False, True):
        kinds = [e for e in entries if (e["set"] != "none") == with_set]
        found = {(e["method"], e["pass"], e["path"], e["aligned"]) for e in kinds}
        expected = {e for e in _expected(group == 8) if with_set or e[0] != "likelihood"}
        if missing := expected - found:
            raise RuntimeError(f"{code.name}: no loop for {sorted(missing)}, set: {with_set}")
    return entries


def _numbered(entries: list[Entry]) -> list[Entry]:
    """With a number where several loops do the same, as the compiler may split one."""
    seen: Counter[str] = Counter()
    for e in entries:
        e["copy"] = 0
        name = key_of(e)
        e["copy"] = seen[name]
        seen[name] += 1
    return entries


class Row(NamedTuple):
    """What a row takes besides its loops."""

    chain: list[Entry]  # the steps between the last chunk's arrival and the first store
    fixed: tuple[float, float]  # instructions a warp, without and for the gradient


class Cuda(NamedTuple):
    entries: list[Entry]
    layouts: dict[tuple[str, str], row_model.Layout]  # by architecture and dtype
    rows: dict[tuple[str, str], Row]


_LAYOUT = """
extern "C" __device__ const int tnt_layout[] = {{tnt::device::KL_THREADS, tnt::KL_STEPS, tnt::KL_SLICE, {values}}};
__device__ const int* tnt_layout_is_used() {{ return tnt_layout; }}
"""


def _layout_cases() -> list[tuple[int, int, bool]]:
    clusters = range(1, row_model.H100.largest_cluster + 1)
    return [
        (v, c, pair) for v in row_model.VOCABULARIES for c in clusters for pair in (False, True)
    ]


def _layout_source(source: Path, group: int) -> str:
    """An array in the compiled file that holds what csrc/cuda/kl_kernel.cuh works out about shared memory."""
    found = re.search(r"cuda_rows<(\w+), (\w+)>", source.read_text())
    if not found:
        raise RuntimeError(f"{source.name} instantiates no cuda_rows")
    types = ", ".join(x if x == "float" else f"tnt::{x}" for x in found.groups())
    block = f"tnt::KlBlock<{types}, false>"
    values = []
    for vocab, cluster, pair in _layout_cases():
        columns = vocab if vocab % group == 0 else vocab + group - 1
        part = f"(({columns} + {cluster - 1}) / {cluster} + tnt::KL_SLICE - 1) / tnt::KL_SLICE * tnt::KL_SLICE"
        values.append(
            f"{block}::shared_bytes({part}, {cluster}, tnt::device::KL_THREADS, {str(pair).lower()})"
        )
    return _LAYOUT.format(values=",\n".join(values))


def count_cuda(
    dtypes: Sequence[str] = tuple(GROUPS), architectures: Sequence[str] = ARCHITECTURES
) -> Cuda:
    entries: list[Entry] = []
    layouts: dict[tuple[str, str], row_model.Layout] = {}
    rows: dict[tuple[str, str], Row] = {}
    for dtype in dtypes:
        group, source = GROUPS[dtype], ROOT / "csrc" / "cuda" / f"{dtype}.cu"
        built = machine_code.compile_cuda(
            source, architectures, "9kl_kernel", _layout_source(source, group)
        )
        threads, steps, granule, *shared = machine_code.integers_of(built.ptx, "tnt_layout")
        for architecture, kernels in built.kernels.items():
            for kernel in kernels:
                flags = re.search(r"9kl_kernelI.*?Lb([01])E", kernel.code.name)
                if not flags:
                    raise RuntimeError(
                        f"{kernel.code.name}: not kl_kernel<Logit, Gradient, DIAGNOSTICS>"
                    )
                statistics = flags[1] == "1"
                if statistics and dtype not in STATISTICS:
                    continue
                for e in _kernel_entries(kernel, group):
                    which = {
                        "backend": "cuda", "arch": architecture, "dtype": dtype, "statistics": statistics,
                        "gradient": True,
                    }  # fmt: skip
                    entries.append({**which, **e, **kernel.resources})
                if not statistics:
                    place = architecture, dtype
                    layouts[place] = row_model.Layout(
                        group, threads, steps, granule, kernel.resources["registers"],
                        dict(zip(_layout_cases(), shared, strict=True)),
                    )  # fmt: skip
                    rows[place] = _row(kernel.code, group, threads // 32)
    return Cuda(_numbered(entries), layouts, rows)


# ---------------------------------------------------------------------------------------------- a row's other steps

#: Cycles from a message's departure to its arrival in another block of the cluster, as others have published it for
#: H100; an estimate here.
MESSAGE = 180


def _row(code: Code, group: int, warps: int) -> Row:
    """The shortest ways between the marks of a forward KL's row without a set. (What a warp skips is not on them.)"""
    loops = [
        (x, _kind(code, x), {e["path"] for e in _loop_entries(code, x, group)})
        for x in _loops_over_rows(code, group)
    ]
    mine = [
        (x, kind, paths) for x, kind, paths in loops if kind.method == "forward" and not kind.set
    ]
    first = next(x for x, kind, _ in mine if not kind.stores)
    wanted = "direct" if group == 8 else "near"
    second = next(x for x, kind, paths in mine if kind.stores == "vectors" and wanted in paths)
    code_at = code.instructions

    def begin(loop: Loop) -> int:
        return code.blocks[loop.head].begin

    def inside(loop: Loop) -> set[int]:
        return {i for n in loop.blocks for i in range(code.blocks[n].begin, code.blocks[n].end)}

    def named(*names: str) -> set[int]:
        return {i for i, x in enumerate(code_at) if x.name in names}

    def way(start: int, goal: set[int], what: str) -> list[int]:
        found = code.route(start, goal.__contains__)
        if found is None:
            raise RuntimeError(f"{code.name}: {what} is not reached")
        return found

    def steps(places: Sequence[int]) -> tuple[int, int]:
        return len(places), machine_code.cycles([code_at[i] for i in places])

    in_first = inside(first)
    leaving = [
        code.blocks[to].begin
        for n in first.blocks
        for to in code.blocks[n].next
        if to not in first.blocks
    ]
    turn = min((x for x in code.paths(first)), key=lambda x: sum(1 for _ in code.of(x)))
    turn_places = [i for n in turn for i in range(code.blocks[n].begin, code.blocks[n].end)]
    barriers = named("BAR")
    sends = named("STAS")
    waits = {
        i for i, x in enumerate(code_at) if x.name == "SYNCS" and "TRYWAIT" in x.opcode
    } - in_first
    sums = way(leaving[0], sends, "the message")
    wait = way(sums[-1], waits, "the wait for messages")
    coefficients = {
        i for i, x in enumerate(code_at) if x.name == "STS" and _functions([x], ["kl_coefficients"])
    }
    if not coefficients:  # the compiler has named the stores otherwise
        coefficients = {
            i for i, x in enumerate(code_at) if x.name == "STS" and "5judge" in x.function
        }
    to_wait, judged = wait[1:], way(wait[-1], coefficients, "the coefficients")[1:]
    told = way(judged[-1], barriers, "the barrier")[1:]
    read = way(told[-1], {begin(second)}, "the second pass")[1:]
    stored = way(begin(second), named("STG"), "the first store")
    chain: list[Entry] = []
    for what, places in (
        ("a group of the first pass, near, once its bytes are there", turn_places),
        ("sums of the warp, until they are sent", sums),
        ("until the judge waits", to_wait),
        ("the judge: from the messages to the first coefficient", judged),
        ("the other coefficients, until the block is told", told),
        ("coefficients are read, until the second pass", read[:-1]),
        ("a group of the second pass, until it is stored", stored),
    ):
        count, cycles = steps(places)
        chain.append({"step": what, "instructions": count, "cycles": cycles})
        if what.startswith("until"):
            chain.append({"step": "the messages travel", "instructions": 0, "cycles": MESSAGE})
    # A warp's instructions on a row: all go the first way; one judges, one copies, one finds the levels.
    entry = way(0, {begin(first)}, "the first pass")
    after = way(sums[-1], barriers, "the barrier")
    leave = way(begin(second), named("EXIT"), "the end")
    turn_of_second = min(sum(1 for _ in code.of(x)) for x in code.paths(second))
    judge = len(to_wait) + len(judged) + len(told)
    copies = way(0, named("UBLKCP"), "the copies")
    fixed = len(entry) - 1 + len(sums) + len(after) + len(copies) / warps + judge / warps
    fixed_of_gradient = len(read) - 1 + max(0, len(leave) - turn_of_second)
    return Row(chain, (round(fixed, 1), round(float(fixed_of_gradient), 1)))


# ---------------------------------------------------------------------------------------------------------- Triton


class TritonCase(NamedTuple):
    method: str
    aligned: bool = True
    ids: int = 0
    few: bool = False  # as many as are looked at together
    gradient: bool = True
    statistics: bool = False


TRITON_CASES = (
    *(TritonCase(m, aligned) for m in ("tnff", "tnrr") for aligned in (True, False)),
    *(TritonCase(m, ids=1, few=few) for m in ("tnff", "tnrr") for few in (True, False)),
    *(TritonCase(m, gradient=False) for m in ("tnff", "tnrr")),
    *(TritonCase(m, statistics=True) for m in ("tnff", "tnrr")),
)
TRITON_COLUMNS = 8  # of a lane and tile: 16 bytes of bfloat16


def compile_triton(
    case: TritonCase, architecture: str, vocab: int = 128256
) -> tuple[Code, dict[str, int]]:
    """``kl_kernel`` of the Triton backend for logits in bfloat16, ahead of time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import tnt_kernels.backends.triton as backend
    from tnt_kernels._call import Kind
    from tnt_kernels.backends.triton.config import row_config
    from tnt_kernels.backends.triton.kernels import kl_kernel
    from tnt_kernels.backends.triton.objectives import Factors
    from tnt_kernels.objectives import METHODS

    objective = METHODS[case.method]
    config = row_config(
        vocab, 2, kind="KL", gradient=case.gradient, ids=case.ids > 0, architecture=architecture
    )
    constants: dict[str, Any] = {
        "POSITIVE": int(objective.positive_loss), "NEGATIVE": int(objective.negative_loss), "KIND": int(Kind.FUSED),
        "GRADIENT": case.gradient, "BLOCK": config.block, "UNROLL": config.unroll, "NEAR_KL": 1e-6, "IDS": case.ids,
        "FEW": case.few, "CHUNK": 64, "EVEN": case.aligned, "ALIKE": True, "DIFFERENCES": False,
    }  # fmt: skip
    present = {
        "ids": case.ids > 0, "bits": case.ids > 0, "diagnostics": case.statistics, "coefficients": False,
        "gradient": case.gradient, "upstream": False, "statistics": False,
    }  # fmt: skip
    constants |= {name: None for name, there in present.items() if not there}
    types: dict[str, str] = {
        **dict.fromkeys(("logits", "ref_logits", "gradient"), "*bf16"), "labels": "*i64", "bits": "*u8",
        **dict.fromkeys(("ids", "left"), "*i32"), **dict.fromkeys(("eps", "scale", "inverse_t"), "fp32"),
        **dict.fromkeys(("weights", "losses", "diagnostics"), "*fp32"),
    }  # fmt: skip
    names = kl_kernel.arg_names
    signature: dict[str, Any] = {
        n: "constexpr" if n in constants else types.get(n, "i32") for n in names
    }
    signature["factors"] = Factors("constexpr", "i32", "fp32", "*fp32")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if str(signature[name]).startswith("*") and name not in ("logits", "ref_logits", "gradient")
    }
    alpha = names.index("factors"), Factors._fields.index("alpha")
    constexprs: dict[Any, Any] = {**constants, alpha: None}
    source = ASTSource(kl_kernel, signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(architecture[3:]), 32),
        options=backend.options(config, architecture),
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        (code,) = machine_code.disassemble(cubin)
        used = machine_code.resource_usage(cubin)
    return code, used


def _triton_entries(code: Code, case: TritonCase) -> list[Entry]:
    """The loops over full tiles: they load 16 bytes a lane without asking whether the row goes on."""
    method = {"tnff": "forward", "tnrr": "reverse"}[case.method]
    best: dict[tuple[str, str], Entry] = {}
    for loop in code.hot_loops(TRITON_COLUMNS):
        body = list(code.of(loop.blocks))
        loads = sum(x.name == "LDG" and ".128" in x.opcode and not x.predicate for x in body)
        if not loads or loads % 2:
            continue
        which = "second" if any(x.name == "STG" for x in body) else "first"
        pairs = loads // 2 * TRITON_COLUMNS
        for path in code.paths(loop):
            turn = list(code.of(path))
            each, rest = divmod(sum(x.is_exponential for x in turn), pairs)
            # By exponentials: 3 are a forward KL's where p is next to q, 2 its direct form, or a first pass.
            second = {1: "any"} if method == "reverse" else {2: "any", 3: "near 0"}
            expected = {2: "any"} if which == "first" else second
            if rest or each not in expected:
                raise RuntimeError(
                    f"{code.name}: {each} exponentials and {rest} in a {which} pass of {pairs} pairs"
                )
            path_name = expected[each]
            e: Entry = {
                "method": method, "pass": which, "path": path_name, "aligned": case.aligned,
                "set": "few ids" if case.few else "ids" if case.ids else "none", "slots": round(len(turn) / pairs, 3),
                "local": sum(x.name in ("LDL", "STL") for x in turn), "pairs": pairs,
                "classes": machine_code.classes(turn, pairs),
            }  # fmt: skip
            known = best.get((which, path_name))
            # A loop of two tiles a turn leaves one of one tile behind it.
            if known is None or (e["pairs"], -e["slots"]) > (known["pairs"], -known["slots"]):
                best[which, path_name] = e
    expected_passes = {"first", "second"} if case.gradient else {"first"}
    if {which for which, _ in best} != expected_passes:
        raise RuntimeError(f"{code.name}, {case}: loops over full tiles for {sorted(best)}")
    return list(best.values())


def count_triton(
    architectures: Sequence[str] = ARCHITECTURES, cases: Sequence[TritonCase] = TRITON_CASES
) -> list[Entry]:
    entries = []
    for architecture in architectures:
        for case in cases:
            code, used = compile_triton(case, architecture)
            which = {
                "backend": "triton", "arch": architecture, "dtype": "bfloat16", "statistics": case.statistics,
                "gradient": case.gradient,
            }  # fmt: skip
            entries += [{**which, **e, **used} for e in _triton_entries(code, case)]
    return _numbered(entries)


# ----------------------------------------------------------------------------------------------------- both passes


class Sum(NamedTuple):
    what: str
    slots: float
    target: float


def sums(entries: Sequence[Mapping[str, Any]]) -> list[Sum]:
    """Both passes together next to the targets: bfloat16, sm_90, no set."""
    mine = [
        e
        for e in entries
        if e["arch"] == "sm_90" and e["dtype"] == "bfloat16" and not e["statistics"] and e["set"] == "none"
        and e["gradient"]
    ]  # fmt: skip

    def slots(backend: str, method: str, which: str, path: str, aligned: bool) -> float | None:
        found = [
            float(e["slots"])
            for e in mine
            if (e["backend"], e["method"], e["pass"], e["path"], e["aligned"])
            == (backend, method, which, path, aligned)
        ]
        return min(found, default=None)

    found = []
    for (backend, method, path), target in TARGETS.items():
        second = {"middle": "far"}.get(path, path)  # of a group that was not near
        for aligned in (True, False):
            # What differs between CUDA's rows is how the gradient is stored.
            a = slots(backend, method, "first", path, aligned) or slots(
                backend, method, "first", path, True
            )
            b = slots(backend, method, "second", second, aligned)
            if a is None or b is None:
                continue
            more = 0.0 if aligned else MISALIGNED[backend]
            name = f"{backend}, {method}, {path}{'' if aligned else ', misaligned'}"
            found.append(Sum(name, round(a + b, 2), target + more))
    return found


def work_of(cuda: Cuda, architecture: str = "sm_90", dtype: str = "bfloat16") -> row_model.Work:
    """Slots a pair of the rows that the benchmarks have: one in four has its label removed."""
    table = {
        (e["method"], e["pass"], e["path"], e["set"]): e["slots"]
        for e in reversed(cuda.entries)
        if (e["arch"], e["dtype"], e["statistics"], e["aligned"])
        == (architecture, dtype, False, True)
    }

    def one(method: str, which: str, path: str) -> float:
        with_set = table.get(
            (method, which, path, "elsewhere"), table.get((method, which, path, "in the group"))
        )
        if with_set is None:
            raise KeyError((method, which, path))
        none = table[method, which, path, "none"]
        return float(none + row_model.NEGATIVE * (with_set - none))

    def slots(method: str, gradient: bool, distance: float) -> float:
        if method == "ul+ll":
            passes = ("first", "second") if gradient else ("first",)
            return sum(
                float(table["likelihood", which, "likelihood", "in the group"]) for which in passes
            )
        reverse = method == "tnrr"
        name = "reverse" if reverse else "forward"
        share = row_model.shares(reverse, distance)
        total = sum(n * one(name, "first", path) for path, n in share.first.items())
        # The pass that looks for maxima loads, converts and compares, no more: it is taken as a third of a near one.
        total += share.maxima * one(name, "first", "near") / 3
        if gradient:
            total += sum(n * one(name, "second", path) for path, n in share.second.items())
        return total

    return row_model.Work(slots, cuda.rows[architecture, dtype].fixed)


def predictions(cuda: Cuda) -> list[Entry]:
    """Of sm_90's code in bfloat16, 8192 rows."""
    layout, work, found = cuda.layouts["sm_90", "bfloat16"], work_of(cuda), []
    for device in (row_model.H100, row_model.H200):
        for vocab in row_model.VOCABULARIES:
            for method in ("tnff", "tnrr", "ul+ll"):
                launch = row_model.choose(layout, device, vocab, method != "ul+ll")
                for gradient in (True, False):
                    p = row_model.predict(
                        layout, work, device, launch, method, gradient, 8192, vocab
                    )
                    best = row_model.fastest(layout, work, device, method, gradient, 8192, vocab)
                    found.append(
                        {
                            "device": device.name, "bandwidth_tb_s": device.bandwidth / 1e6, "vocab": vocab,
                            "method": method, "gradient": gradient, "cluster": launch.cluster,
                            "blocks": launch.blocks, "clusters": launch.clusters, "shared": launch.shared,
                            "ms": round(p.ms, 3), "fraction_of_floor": round(p.fraction, 3),
                            "slots_per_pair": round(p.slots, 1), "issue": round(p.issue, 2),
                            "fastest_cluster": best[0].cluster, "fastest_ms": round(best[1].ms, 3),
                        }
                    )  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------------------ tables


def changes(counted: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not within ``TOLERANCE`` of the stored slots, or is in one of both alone; less is a change too."""
    now, then = ({key_of(e): e["slots"] for e in x} for x in (counted, stored))
    return [
        f"{name}: {now.get(name)} slots a pair, stored {then.get(name)}"
        for name in sorted({*now, *then})
        if name not in now
        or name not in then
        or abs(now[name] - then[name]) > TOLERANCE * then[name]
    ]


def _print_entries(entries: Sequence[Mapping[str, Any]], stored: Mapping[str, float]) -> None:
    for e in entries:
        kind = f"{e['backend']} {e['arch']} {e['dtype']}{' statistics' if e['statistics'] else ''}"
        kind += "" if e["gradient"] else " loss alone"
        what = f"{e['method']}, {e['pass']}, {e['path']}{'' if e['aligned'] else ', misaligned'}"
        what += "" if e["set"] == "none" else f", set {e['set']}"
        parts = " ".join(f"{name} {value:g}" for name, value in e["classes"].items())
        print(
            f"{kind:<34}{what:<58}{e['slots']:>7.2f}  stored {stored.get(key_of(e), '-'):>7}  {parts}; "
            f"{e['registers']} registers, {e['stack']} bytes of stack, {e['local']} accesses to it a turn"
        )


def ways(work: row_model.Work) -> list[Entry]:
    """How often a row's groups of 256 columns go each way, and the slots a pair that this makes, in place."""
    found = []
    for reverse in (False, True):
        for distance in row_model.DISTANCES:
            s = row_model.shares(reverse, distance)
            first, second = (
                {name: round(x, 3) for name, x in part.items() if x > 0.0005}
                for part in (s.first, s.second)
            )
            method = "tnrr" if reverse else "tnff"
            slots = round(work.slots(method, True, distance), 2)
            found.append(
                {
                    "method": method,
                    "distance": distance,
                    "first": first,
                    "second": second,
                    "slots": slots,
                }
            )
    return found


def _print_ways(found: Sequence[Mapping[str, Any]]) -> None:
    print("\nWays of a row's groups of 256 columns (above 1 together: some rows are summed twice)")
    for w in found:
        first, second = (
            ", ".join(f"{name} {x:.2f}" for name, x in w[part].items())
            for part in ("first", "second")
        )
        print(
            f"{w['method']}, {w['distance']} apart: first pass {first}; second {second}: "
            f"{w['slots']:.1f} slots a pair in the loops of both"
        )


def _print_model(cuda: Cuda, fit: bool) -> list[row_model.Error]:
    layout, work = cuda.layouts["sm_90", "bfloat16"], work_of(cuda)
    cases = row_model.measured(layout)
    if fit:
        delay, of_a_block = row_model.fit(layout, work, cases)
        print(f"\nfitted: DELAY {delay}, DELAY_OF_BLOCK {of_a_block:.4f}")
    found = row_model.errors(layout, work, cases)
    print("\nInstructions a pair, 8 blocks a row of 128256, and what a profile of 636108d counted")
    for name, (profile, loops, outside) in row_model.against_profile(work).items():
        print(
            f"{name:<24}{loops:>6.1f} in the loops, at least {outside:.1f} outside; profile {profile:.1f}"
        )
    print("\nThe model against what an H200 measured")
    for error in found:
        c = error.case
        what = f"{c.method} {'in place' if c.gradient else 'loss alone'} {c.rows} x {c.vocab}, {c.distance} apart"
        print(
            f"{c.commit} {what:<48}{c.cluster:>3} blocks: {c.ms:.3f} ms measured, {error.predicted:.3f} modelled, "
            f"{100 * error.relative:+.1f} %{'' if c.fitted else ' (not fitted)'}"
        )
    print(summary(found))
    return found


def _figures(found: Sequence[row_model.Error]) -> dict[str, float]:
    sizes = [abs(x.relative) for x in found]
    average, most = sum(sizes) / len(sizes), max(sizes)
    return {"average": round(average, 4), "most": round(most, 4), "cases": len(sizes)}


def summary(found: Sequence[row_model.Error]) -> str:
    parts = []
    for fitted in (True, False):
        some = [x for x in found if x.case.fitted == fitted]
        if some:
            f = _figures(some)
            what = "error of the model" if fitted else "not fitted"
            parts.append(
                f"{what}: {100 * f['average']:.1f} % on average, {100 * f['most']:.1f} % at most, {f['cases']} cases"
            )
    return "; ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {PATH.name}")
    parser.add_argument(
        "--dtype", action="append", choices=[*GROUPS], help="of CUDA's kernels; default: all"
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: both")
    parser.add_argument("--fit", action="store_true", help="the model's constants once more")
    parser.add_argument("--all", action="store_true", help="misaligned rows and statistics too")
    parser.add_argument("--no-triton", action="store_true")
    a = parser.parse_args(argv)
    if reason := why_not():
        sys.exit(reason)
    dtypes, architectures = a.dtype or [*GROUPS], a.arch or ARCHITECTURES
    if a.write and (a.dtype or a.arch or a.no_triton):
        parser.error("--write takes all dtypes, both architectures and Triton")
    stored = json.loads(PATH.read_text()) if PATH.exists() else {"entries": []}
    before = {key_of(e): e["slots"] for e in stored["entries"]}
    cuda = count_cuda(dtypes, architectures)
    no_triton = "--no-triton" if a.no_triton else why_no_triton()
    entries = [*cuda.entries, *([] if no_triton else count_triton(architectures))]
    shown = [e for e in entries if a.all or (e["aligned"] and not e["statistics"])]
    _print_entries(shown, before)
    if no_triton:
        print(f"without Triton: {no_triton}")
    print("\nBoth passes, bfloat16, sm_90")
    for s in sums(entries):
        verdict = "" if s.slots <= s.target + 0.05 else "  MISSED"
        print(f"{s.what:<40}{s.slots:>7.2f}, at most {s.target:g}{verdict}")
    if ("sm_90", "bfloat16") not in cuda.layouts:
        return
    groups = ways(work_of(cuda))
    _print_ways(groups)
    row = cuda.rows["sm_90", "bfloat16"]
    print("\nA row from the last chunk's arrival to its first store (cycles are estimates)")
    for step in row.chain:
        print(f"{step['step']:<60}{step['instructions']:>5} instructions{step['cycles']:>6} cycles")
    total = [sum(x[name] for x in row.chain) for name in ("instructions", "cycles")]
    print(
        f"{'together':<60}{total[0]:>5} instructions{total[1]:>6} cycles, {total[1] / row_model.H200.clock:.2f} us"
    )
    print(
        f"outside the loops {row.fixed[0]:g} instructions a warp at least, and {row.fixed[1]:g} for the gradient"
    )
    found = _print_model(cuda, a.fit)
    predicted = predictions(cuda)
    print(
        "\nPredicted, 8192 rows in bfloat16, 0.3 apart; clusters as if the device had no groups of multiprocessors"
    )
    for p in predicted:
        better = ""
        if p["fastest_ms"] < 0.97 * p["ms"]:
            better = f"; by {p['fastest_cluster']} blocks a row {p['fastest_ms']:.3f} ms"
        print(
            f"{p['device']} at {p['bandwidth_tb_s']} TB/s, V = {p['vocab']}, {p['method']}, "
            f"{'in place' if p['gradient'] else 'loss alone'}: {p['ms']:.3f} ms, {p['fraction_of_floor']:.2f} of the "
            f"floor; {p['cluster']} blocks a row of {p['shared'] / 1024:.1f} KiB, {p['blocks']} a multiprocessor, "
            f"{p['clusters']} rows in flight; "
            f"{p['slots_per_pair']:.1f} slots a pair, {100 * p['issue']:.0f} % of the issue slots{better}"
        )
    if a.write:
        content = {
            "nvcc": machine_code.nvcc_version(),
            "triton": triton_version(),
            "entries": entries,
            "ways": groups,
            "row": {"chain": row.chain, "fixed": row.fixed},
            "model": _figures([x for x in found if x.case.fitted]),
            "model_not_fitted": _figures([x for x in found if not x.case.fitted]),
            "predicted": predicted,
        }
        PATH.write_text(lines(content))


def lines(content: Mapping[str, Any]) -> str:
    """JSON with an entry a line, for readable differences."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(x) for x in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
