"""NVIDIA's machine code as a graph of basic blocks: its innermost loops, and every path through one turn of them.

Every instruction knows from which function of the source it was inlined, template arguments included, so that what a
loop computes need not be guessed: the compiler's line table names lines of the PTX, whose own table names functions.
Tables of lines change no instruction.
"""

from __future__ import annotations

import ast
import functools
import heapq
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

#: What fits no class counts as "other", which is printed like the rest.
CLASSES = ("FP32", "MUFU", "conversion", "integer", "memory", "control", "other")
_OPCODES = {
    "FP32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HFMA2 DMUL DADD DFMA",  # FADD2 and the like: two at once
    "MUFU": "MUFU",
    "conversion": "F2FP F2F F2I I2F I2FP F2IP FRND HADD2 HMUL2",
    # Comparisons and selections of floats leave by the same pipe as integers.
    "integer": """FMNMX FSEL FSETP FCHK FSET FSWZADD SEL ISETP LOP3 LOP SHF PLOP3 IADD3 IADD LEA PRMT VIADD IMAD IMNMX
        VIMNMX VIADDMNMX IABS MOV CS2R S2R S2UR R2UR R2P P2R POPC FLO BREV SGXT BMSK LEPC UIADD3 ULEA UMOV ULOP3 USHF
        UISETP USEL UIMAD UPRMT UFLO UPLOP3 UP2UR USGXT UPOPC UIADD3X UBMSK VOTEU R2UR CREDUX REDUX UVIADD UIMNMX
        UVIMNMX FMNMX3 VIMNMX3 VHMNMX IMAD2 UR2UP""",
    "memory": """LDS STS LDG STG LDC ULDC LDCU LDL STL LD ST ATOM ATOMS ATOMG RED REDG STAS UBLKCP UBLKPF SYNCS SHFL
        LDSM CCTL MEMBAR FENCE ERRBAR MAPA UTMALDG LDGSTS LDGDEPBAR QSPC CCTLL UCGABAR_ARV UCGABAR_WAIT LDTM STTM""",
    "control": """BRA BSSY BSYNC EXIT WARPSYNC VOTE BAR NOP CALL RET BREAK YIELD BRX JMP BMOV NANOSLEEP DEPBAR ELECT
        WARPGROUP ENDCOLLECTIVE KILL RPCMOV PMTRIG BRXU ACQBULK PREEXIT UCGABAR""",
}  # fmt: skip
CLASS_OF = {opcode: name for name, opcodes in _OPCODES.items() for opcode in opcodes.split()}
#: No loop of the kernels has so many paths.
MOST_PATHS = 4096


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@P0", "@!UP1", or nothing
    opcode: str  # with its modifiers
    operands: str
    function: str  # mangled, of the source; empty where no table tells

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_exponential(self) -> bool:
        return self.opcode.startswith("MUFU.EX2")

    @property
    def targets(self) -> list[str]:
        """Labels that it may go to. Those of a table of jumps stand in the disassembler's remark."""
        if self.name == "BRX":
            return re.findall(r"\.L_x_\w+", self.operands)
        return re.findall(r"`\((\.L_x_\w+)\)", self.operands)


class Block(NamedTuple):
    begin: int
    end: int  # past its last instruction
    next: tuple[int, ...]  # numbers of the blocks that may follow


class Loop(NamedTuple):
    head: int
    blocks: frozenset[int]


class Code:
    """A kernel's instructions, and the graph of its blocks."""

    def __init__(
        self, name: str, instructions: Sequence[Instruction], labels: dict[str, int]
    ) -> None:
        self.name = name
        self.instructions = instructions
        starts = {0, *labels.values()}
        for i, x in enumerate(instructions):
            if x.name in ("BRA", "EXIT", "RET", "BRX", "BREAK", "CALL", "JMP"):
                starts.add(i + 1)
        ordered = sorted(i for i in starts if i < len(instructions))
        number = {begin: n for n, begin in enumerate(ordered)}
        self.blocks: list[Block] = []
        for n, begin in enumerate(ordered):
            end = ordered[n + 1] if n + 1 < len(ordered) else len(instructions)
            last = instructions[end - 1]
            after = [] if end == len(instructions) else [number[end]]
            to = [number[labels[x]] for x in last.targets if x in labels]
            if last.name == "BRA":
                # A converged warp passes by a branch for divergent ones.
                if to and not last.opcode.startswith("BRA.DIV"):
                    after = [*(after if _conditional(last) else []), *to]
            elif last.name == "BRX":
                if not to:
                    raise RuntimeError(
                        f"{name}: a jump by a table that the disassembler does not show"
                    )
                after = to
            elif last.name in ("EXIT", "RET", "JMP") and not last.predicate:
                after = []
            self.blocks.append(Block(begin, end, tuple(dict.fromkeys(after))))
        self.block_of = {i: n for n, b in enumerate(self.blocks) for i in range(b.begin, b.end)}

    def of(self, blocks: Sequence[int] | frozenset[int]) -> Iterator[Instruction]:
        for n in blocks if isinstance(blocks, tuple) else sorted(blocks):
            yield from self.instructions[self.blocks[n].begin : self.blocks[n].end]

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """The natural ones: those of one head are one."""
        before: dict[int, list[int]] = {n: [] for n in range(len(self.blocks))}
        for n, block in enumerate(self.blocks):
            for to in block.next:
                before[to].append(n)
        dominators = self._dominators(before)
        found: dict[int, set[int]] = {}
        for n, block in enumerate(self.blocks):
            for head in block.next:
                if n not in dominators or head not in dominators[n]:
                    continue
                body = found.setdefault(head, {head})
                work = [n]
                while work:
                    m = work.pop()
                    if m not in body:
                        body.add(m)
                        work += [k for k in before[m] if k in dominators]
        return [Loop(head, frozenset(body)) for head, body in sorted(found.items())]

    def _dominators(self, before: dict[int, list[int]]) -> dict[int, set[int]]:
        order: list[int] = []
        seen = {0}
        work = [(0, iter(self.blocks[0].next))]
        while work:
            n, rest = work[-1]
            to = next((k for k in rest if k not in seen), None)
            if to is None:
                order.append(n)
                work.pop()
            else:
                seen.add(to)
                work.append((to, iter(self.blocks[to].next)))
        order.reverse()
        dominators = {n: set(order) for n in order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for n in order[1:]:
                sets = [dominators[k] for k in before[n] if k in dominators]
                new = set.intersection(*sets) | {n}
                if new != dominators[n]:
                    dominators[n], changed = new, True
        return dominators

    def hot_loops(self, exponentials: int) -> list[Loop]:
        """The innermost ones of those with at least so many exponentials. (Retries of a wait are loops without.)"""
        hot = [
            x
            for x in self.loops
            if sum(i.is_exponential for i in self.of(x.blocks)) >= exponentials
        ]
        return [x for x in hot if not any(y.blocks < x.blocks for y in hot)]

    def paths(self, loop: Loop) -> list[tuple[int, ...]]:
        """All ways through one turn, as blocks in order, for a wait that is over when it is asked for."""
        found: list[tuple[int, ...]] = []
        inner = [x for x in self.loops if x.blocks < loop.blocks]
        work: list[tuple[int, ...]] = [(loop.head,)]
        while work:
            path = work.pop()
            for to in self.blocks[path[-1]].next:
                if to == loop.head:
                    found.append(path)
                elif to in loop.blocks and to not in path:
                    work.append((*path, to))
            if len(found) + len(work) > MOST_PATHS:
                raise ValueError(f"more than {MOST_PATHS} paths in a loop of {self.name}")
        if not found:
            raise ValueError(f"no path through a loop of {self.name}")

        def retries(path: tuple[int, ...]) -> int:
            return sum(any(n in x.blocks for x in inner) for n in path)

        least = min(map(retries, found))
        return [path for path in found if retries(path) == least]

    def route(
        self, start: int, goal: Callable[[int], bool], avoid: Callable[[int], bool] | None = None
    ) -> list[int] | None:
        """The fewest instructions, as their places, from ``start`` to the next place that is the goal, it included.

        ``avoid``: places that it does not come to.
        """
        heap: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [(0, start, ())]
        done: set[int] = set()
        while heap:
            cost, at, spans = heapq.heappop(heap)
            if at in done:
                continue
            done.add(at)
            block = self.blocks[self.block_of[at]]
            for i in range(at, block.end):
                if i > start and goal(i):
                    return [k for a, b in (*spans, (at, i + 1)) for k in range(a, b)]
                if avoid and avoid(i):
                    break
            else:
                for to in block.next:
                    step = (*spans, (at, block.end))
                    heapq.heappush(heap, (cost + block.end - at, self.blocks[to].begin, step))
        return None


def _conditional(x: Instruction) -> bool:
    return bool(x.predicate) or bool(re.match(r"!?U?P[0-6]\b", x.operands))


def classes(instructions: Sequence[Instruction], pairs: int) -> dict[str, float]:
    """Issue slots a pair, by class. One that is predicated off takes its slot too."""
    counted = Counter(CLASS_OF.get(x.name, "other") for x in instructions)
    return {name: round(counted[name] / pairs, 3) for name in CLASSES if counted[name]}


#: Cycles from issue to the first use of a result. Of arithmetic and shared memory as microbenchmarks of Volta to Hopper
#: have published them; what a barrier, a retry or a branch takes is an estimate. None was measured for this project.
LATENCIES = {
    "FP32": 4, "MUFU": 18, "conversion": 8, "integer": 4, "memory": 29, "control": 2, "other": 8,
    "SHFL": 23, "REDUX": 24, "S2R": 20, "S2UR": 20, "R2UR": 10, "LDC": 30, "LDG": 500, "BAR": 30, "SYNCS": 24,
    "VOTE": 10,
}  # fmt: skip
BRANCH = 12  # cycles until a warp that has branched issues again


def cycles(instructions: Sequence[Instruction]) -> int:
    """Estimated, for a warp that waits for nobody: in order, one a cycle, each when its operands are there."""
    ready: dict[str, int] = {}
    now = end = 0
    for x in instructions:
        words = re.split(r",\s*(?![^\[]*\])", x.operands)
        registers = [re.findall(r"\b(U?R\d+|U?P\d+)\b", w) for w in words]
        stores = x.name.startswith(("ST", "BRA", "BAR", "EXIT", "RED", "UBLKCP"))
        places = 0 if stores else 2 if words[0].strip() in ("PT", "UPT") and len(words) > 1 else 1
        if x.name.endswith("SETP"):
            places = 2
        written = [r for group in registers[:places] for r in group]
        read = [r for group in registers[places:] for r in group]
        read += re.findall(r"U?P\d+", x.predicate)
        if places == 0:
            read += [r for group in registers[:1] for r in group]
        now = max([now, *(ready.get(r, 0) for r in read)])
        latency = LATENCIES.get(x.name, LATENCIES[CLASS_OF.get(x.name, "other")])
        wide = {"128": 4, "64": 2, "WIDE": 2}
        count = max((n for word, n in wide.items() if f".{word}" in x.opcode), default=1)
        for r in written:
            kind, number = re.match(r"(U?[RP])(\d+)", r).groups()  # type: ignore[union-attr]
            for k in range(count if kind.endswith("R") else 1):
                ready[f"{kind}{int(number) + k}"] = now + latency
        end = max(end, now + (latency if x.name == "BAR" else 1))
        if x.name == "BAR":
            now += LATENCIES["BAR"]
        else:
            now += BRANCH if x.name == "BRA" and not x.predicate else 1
    return max(end, now)


# ----------------------------------------------------------------------------------------------------------- tools


def _bundled(name: str) -> str:
    """A tool of the CUDA toolkit, or the one that comes with Triton."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return ""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else ""


def tool(name: str) -> str:
    """The path of nvcc, ptxas, nvdisasm or cuobjdump; empty where there is none."""
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin", name).exists():
        return str(Path(home, "bin", name))
    if name in ("nvcc", "ptxas"):  # of one toolkit
        nvcc = shutil.which("nvcc")
        for folder in (Path(nvcc).resolve().parent if nvcc else None, Path("/usr/local/cuda/bin")):
            if folder and (folder / name).exists() and (folder / "ptxas").exists():
                return str(folder / name)
        return ""
    return _bundled(name)


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return result.stdout + result.stderr


@functools.cache
def nvcc_version() -> str:
    found = re.search(r"V(\d+\.\d+\.\d+)", _run([tool("nvcc"), "--version"]))
    if not found:
        raise RuntimeError("nvcc --version names no version")
    return found[1]


def nvcc_flags() -> list[str]:
    """Those of setup.py that the code of a GPU depends on."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            text = next(
                x.value
                for x in ast.walk(node)
                if isinstance(x, ast.Constant) and isinstance(x.value, str)
            )
            words = iter(text.split())
            takes_one = ("-Xptxas", "-Xfatbin", "-Xcompiler")
            return [x for x in words if not (x in takes_one and next(words))]
    raise RuntimeError("setup.py sets no NVCC_FLAGS")


class Compiled(NamedTuple):
    code: Code
    #: Registers, stack, spilled bytes, shared memory besides the launch's.
    resources: dict[str, int]


class Built(NamedTuple):
    kernels: dict[str, list[Compiled]]  # by architecture
    ptx: str  # of the first


def compile_cuda(source: Path, architectures: Sequence[str], entry: str, more: str = "") -> Built:
    """The kernels of a source file whose names hold ``entry``, with ``more`` code after it.

    By nvcc's own two steps, so that the kernels that nobody asked for need not be assembled.
    """
    flags = nvcc_flags()
    found: dict[str, list[Compiled]] = {}
    first = ""
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder, source.name)
        unit.write_text(f'#include "{source}"\n{more}\n')
        for architecture in architectures:
            number = architecture.removeprefix("sm_")
            ptx, cubin = Path(folder, f"{number}.ptx"), Path(folder, f"{number}.cubin")
            _run(
                [
                    tool("nvcc"), *flags, "-lineinfo", f"-I{ROOT / 'csrc'}", f"-arch=compute_{number}", "-ptx",
                    str(unit), "-o", str(ptx),
                ]
            )  # fmt: skip
            text = ptx.read_text()
            first = first or text
            names = [x for x in re.findall(r"\.entry (\w+)\(", text) if entry in x]
            if not names:
                raise RuntimeError(f"{source.name} has no kernel {entry}")
            entries = [word for name in names for word in ("--entry", name)]
            fused = "false" if "-fmad=false" in flags else "true"
            report = _run(
                [
                    tool("ptxas"), "-v", "--fmad", fused, "--generate-line-info", f"-arch=sm_{number}", *entries,
                    str(ptx), "-o", str(cubin),
                ]
            )  # fmt: skip
            used = _resources(report)
            found[architecture] = [
                Compiled(code, used[code.name])
                for code in disassemble(cubin, functions_of_lines(text))
                if code.name in names
            ]
    return Built(found, first)


def integers_of(ptx: str, name: str) -> list[int]:
    """The values of an array of int that a PTX file defines."""
    found = re.search(rf"\.global \.align 4 \.b8 {name}\[\d+\] = \{{([\d, ]+)\}}", ptx)
    if not found:
        raise RuntimeError(f"the PTX defines no {name}")
    data = bytes(int(x) for x in found[1].split(","))
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def _resources(report: str) -> dict[str, dict[str, int]]:
    """Of ptxas -v."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in report.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name = m[1]
        elif m := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            found[name] = {"stack": int(m[1]), "spills": int(m[2]) + int(m[3])}
        elif m := re.search(r"Used (\d+) registers", line):
            found[name]["registers"] = int(m[1])
            shared = re.search(r"(\d+) bytes smem", line)
            found[name]["static_shared"] = int(shared[1]) if shared else 0
    return found


def functions_of_lines(ptx: str) -> list[str]:
    """For every line of a PTX file (the first is 0, and is none) the function from which it was inlined, mangled."""
    lines = ptx.splitlines()
    strings: dict[str, str] = {}
    label, data = "", bytearray()
    for line in lines:
        if m := re.match(r"\$L__info_string(\d+):", line):
            label, data = m[1], bytearray()
        elif label and (m := re.match(r"\s*\.b8\s+([\d, ]+)", line)):
            data += bytes(int(x) for x in m[1].split(","))
            if 0 in data:
                strings[label] = data[: data.index(0)].decode()
                label = ""
    functions = [""]
    kernel = current = ""
    for line in lines:
        if m := re.search(r"\.entry (\w+)\(", line):
            kernel = current = m[1]
        elif re.match(r"\s*\.loc\s", line):
            named = re.search(r"function_name \$L__info_string(\d+)", line)
            current = strings[named[1]] if named else kernel
        functions.append(current)
    return functions


def disassemble(cubin: Path, functions: Sequence[str] = ()) -> list[Code]:
    text = _run([tool("nvdisasm"), *(["-gp"] if functions else []), "-c", str(cubin)])
    found: list[Code] = []
    name, function = "", ""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}

    def finish() -> None:
        if name and instructions:
            found.append(Code(name, instructions, labels))

    for line in text.splitlines():
        if m := re.match(r"\s*\.section\s+(\S+?),", line):
            finish()
            name = m[1].removeprefix(".text.") if m[1].startswith(".text.") else ""
            instructions, labels, function = [], {}, ""
        elif not name:
            continue
        elif m := re.match(r"\s*//## File \"\.nv_debug_ptx_txt\", line (\d+)", line):
            function = functions[int(m[1])] if int(m[1]) < len(functions) else ""
        elif m := re.match(r"(\.L_x_\w+):", line):
            labels[m[1]] = len(instructions)
        elif m := re.match(
            r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;", line
        ):
            instructions.append(Instruction(int(m[1], 16), m[2] or "", m[3], m[4], function))
    finish()
    return found


def resource_usage(cubin: Path) -> dict[str, int]:
    """As ``Compiled`` has it, of a file with one kernel."""
    report = _run([tool("cuobjdump"), "--dump-resource-usage", str(cubin)])
    names = {"REG": "registers", "STACK": "stack", "LOCAL": "spills", "SHARED": "static_shared"}
    found = re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)
    return {names[name]: int(value) for name, value in found}
