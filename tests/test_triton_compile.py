"""The Triton kernels, compiled ahead of time for GPUs that need not be here: no spill and no stack in any variant.

The summary of the run lists registers and shared memory of each.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from oracle import INTERPRETED

from tnt_kernels._call import Kind
from tnt_kernels.backends import triton as backend
from tnt_kernels.backends.triton.config import RowConfig, left_config, row_config
from tnt_kernels.objectives import METHODS

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("interpreted functions cannot be compiled", allow_module_level=True)

from tnt_kernels.backends.triton.objectives import Factors  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


class Variant(NamedTuple):
    method: str = "tnff"
    dtype: str = "bf16"
    gradient_dtype: str = ""  # that of the logits
    kind: Kind = Kind.FUSED
    ids: int = 0
    few: bool = False  # of these
    uniform: bool = False
    diagnostics: bool = False
    gradient: bool = True
    aligned: bool = True
    vocab: int = 128256
    left: bool = False  # the rows that kl_kernel left
    saved: bool = False  # a plan, for a gradient that waits
    differences: bool = False  # to the reference; with upstream factors

    def __str__(self) -> str:
        changed = (
            f"{name}={getattr(value, 'name', value)}"
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
        )
        return " ".join(changed) or "default"


#: Everything that takes registers, on the architecture of the figures; the rest on all of them.
VARIANTS = (
    *(Variant(method=method, ids=1) for method in METHODS),
    Variant(method="tnrf", ids=2, diagnostics=True),
    Variant(method="tnrf", gradient=False, diagnostics=True, ids=1),
    Variant(method="tnrr", uniform=True),
    Variant(method="tnrll", uniform=True, diagnostics=True, ids=1, gradient=False),
    Variant(method="tnrf", dtype="fp32", ids=1),
    Variant(method="tnrf", dtype="fp32", gradient_dtype="bf16", ids=1),
    Variant(method="tnrf", dtype="fp16", gradient=False),
    Variant(method="tnrf", aligned=False, ids=1),
    *(Variant(method="tnrf", kind=Kind.BACKWARD, dtype=dtype, ids=1) for dtype in ("fp16", "fp32")),
    Variant(method="tnrf", kind=Kind.STATISTICS, ids=1, gradient=False, diagnostics=True),
    Variant(method="tnrf", kind=Kind.PARTIAL_SUMS, ids=1),
    Variant(method="tnff", kind=Kind.PARTIAL_SUMS),
    Variant(method="tnrr", kind=Kind.FINISH, uniform=True, diagnostics=True),
    *(Variant(method="tnrf", vocab=vocab, ids=1) for vocab in (100, 4000, 16000)),
    *(Variant(method="tnrf", ids=1, gradient=gradient, left=True) for gradient in (True, False)),
    *(Variant(method=method, ids=1, differences=True) for method in ("tnrf", "ul+ll")),
)
EVERYWHERE = (Variant(), Variant(method="tnrf", ids=1), Variant(method="ul+ll", dtype="fp32"))
#: Of the kernel of KL rows.
KL_VARIANTS = (
    *(Variant(method=method) for method in ("tnff", "tnrr", "tnrf")),
    *(Variant(method="tnrf", ids=ids, few=few) for ids in (1, 2) for few in (True, False)),
    Variant(method="tnrf", aligned=False),
    *(
        Variant(method="tnrf", gradient=False, vocab=vocab, ids=ids)
        for vocab in (32000, 128256)
        for ids in (0, 1)
    ),
    Variant(method="tnrf", dtype="fp16", gradient=False, saved=True),
    Variant(method="tnrf", dtype="fp32"),
    Variant(method="tnrf", dtype="fp32", gradient=False),
    Variant(method="tnff", diagnostics=True),
    Variant(method="tnrr", diagnostics=True),
    Variant(method="tnrf", diagnostics=True, gradient=False, ids=1),
    Variant(method="tnrf", kind=Kind.STATISTICS, gradient=False),
    Variant(method="tnrf", dtype="fp32", gradient_dtype="bf16", ids=1, aligned=False),
    *(Variant(method="tnrf", vocab=vocab) for vocab in (100, 4000, 16000)),
    Variant(method="tnrf", ids=1, differences=True),
    Variant(method="tnrf", gradient=False, differences=True),
)
KL_EVERYWHERE = (Variant(method="tnrf"), Variant(method="tnrf", ids=1, few=True))
KL_CASES = [(a, v) for a in ARCHITECTURES for v in (KL_VARIANTS if a == "sm_90" else KL_EVERYWHERE)]
CASES = [(a, v) for a in ARCHITECTURES for v in (VARIANTS if a == "sm_90" else EVERYWHERE)]


#: As a mean has it, whose α is a number.
FACTORS = Factors("constexpr", "i32", "fp32", "*fp32")


def compiled(architecture: str, variant: Variant) -> Any:
    from tnt_kernels.backends.triton.kernels import stream_kernel

    objective, kind, logits = METHODS[variant.method], variant.kind, f"*{variant.dtype}"
    itemsize = 4 if variant.dtype == "fp32" else 2
    reads_reference = objective.reads_reference or variant.differences
    config = left_config(variant.vocab)
    if not variant.left:
        config = row_config(
            variant.vocab, itemsize, kind="two rows" if reads_reference else "one row", gradient=variant.gradient,
            ids=variant.ids > 0, architecture=architecture,
        )  # fmt: skip
    sharded = kind in (Kind.PARTIAL_SUMS, Kind.FINISH)
    constants: dict[str, Any] = {
        "POSITIVE": int(objective.positive_loss),
        "NEGATIVE": int(objective.negative_loss),
        "UNIFORM": variant.uniform,
        "IDS": variant.ids,
        "KIND": int(kind),
        "GRADIENT": variant.gradient,
        "ALIKE": variant.aligned,
        "GRADIENT_ALIKE": variant.aligned,
        "BLOCK": config.block,
        "CHUNK": 64,
        "SHARDS": 8 if sharded else 1,
        "DIFFERENCES": variant.differences,
    }
    present = {
        "ref_logits": reads_reference,
        "ids": variant.ids > 0,
        "bits": variant.ids > 0,
        "losses": kind in (Kind.FUSED, Kind.FINISH),
        "diagnostics": variant.diagnostics,
        "coefficients": kind == Kind.BACKWARD
        or (kind == Kind.FUSED and not variant.gradient and not variant.left),
        "gradient": variant.gradient,
        "upstream": kind == Kind.BACKWARD or variant.differences,
        "statistics": kind == Kind.STATISTICS,
        "gathered": sharded,
        "partial_sums": kind == Kind.PARTIAL_SUMS,
        "total_sums": kind == Kind.FINISH,
        "left": variant.left,
    }
    constants |= {name: None for name, there in present.items() if not there}
    types = {
        **dict.fromkeys(("logits", "ref_logits"), logits),
        "gradient": f"*{variant.gradient_dtype or variant.dtype}",
        "labels": "*i64",
        "bits": "*u8",
        **dict.fromkeys(("ids", "left"), "*i32"),
        **dict.fromkeys(("eps", "log_eps", "nl_floor", "scale", "inverse_t"), "fp32"),
        **dict.fromkeys(
            (
                "weights", "losses", "diagnostics", "coefficients", "upstream", "statistics", "gathered",
                "partial_sums", "total_sums",
            ),
            "*fp32",
        ),
    }  # fmt: skip
    return build(stream_kernel, *described(stream_kernel, constants, types), config, architecture)


def described(
    kernel: Any, constants: dict[str, Any], types: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """As a launch has it: signature, constants, and what is known of the other arguments."""
    signature: dict[str, Any] = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    signature["factors"] = FACTORS
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if str(signature[name]).startswith("*") and name not in ("logits", "ref_logits", "gradient")
    }
    return signature, constants, attributes


def compiled_kl(architecture: str, variant: Variant) -> tuple[Any, RowConfig]:
    from tnt_kernels.backends.triton.kernels import kl_kernel

    objective, logits = METHODS[variant.method], f"*{variant.dtype}"
    itemsize = 4 if variant.dtype == "fp32" else 2
    config = row_config(
        variant.vocab, itemsize, kind="KL", gradient=variant.gradient,
        ids=variant.ids > 0 or variant.differences, architecture=architecture,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "POSITIVE": int(objective.positive_loss),
        "NEGATIVE": int(objective.negative_loss),
        "KIND": int(variant.kind),
        "GRADIENT": variant.gradient,
        "BLOCK": config.block,
        "UNROLL": config.unroll,
        "NEAR_KL": 1e-6,
        "IDS": variant.ids,
        "FEW": variant.few,
        "CHUNK": 1024,
        "EVEN": variant.aligned,
        "ALIKE": True,
        "DIFFERENCES": variant.differences,
    }
    present = {
        "ids": variant.ids > 0,
        "bits": variant.ids > 0,
        "losses": variant.kind == Kind.FUSED,
        "diagnostics": variant.diagnostics,
        "coefficients": variant.saved,
        "gradient": variant.gradient,
        "upstream": variant.differences and variant.gradient,
        "statistics": variant.kind == Kind.STATISTICS,
    }
    constants |= {name: None for name, there in present.items() if not there}
    types = {
        **dict.fromkeys(("logits", "ref_logits"), logits),
        "gradient": f"*{variant.gradient_dtype or variant.dtype}",
        "labels": "*i64",
        "bits": "*u8",
        **dict.fromkeys(("ids", "left"), "*i32"),
        **dict.fromkeys(("eps", "scale", "inverse_t"), "fp32"),
        **dict.fromkeys(
            ("weights", "losses", "diagnostics", "coefficients", "upstream", "statistics"), "*fp32"
        ),
    }
    kernel = build(kl_kernel, *described(kl_kernel, constants, types), config, architecture)
    return kernel, config


def build(
    kernel: Any,
    signature: dict[str, Any],
    constants: dict[str, Any],
    attributes: dict[tuple[int], list[list[Any]]],
    config: RowConfig,
    architecture: str,
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = architecture.startswith("gfx")
    target = (
        GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    )
    alpha = kernel.arg_names.index("factors"), Factors._fields.index("alpha")
    source = ASTSource(kernel, signature, constexprs={**constants, alpha: None}, attrs=attributes)
    return triton.compile(source, target=target, options=backend.options(config, architecture))


def resources(kernel: Any) -> dict[str, int]:
    """Of the compiler's own report."""
    if "amdgcn" in kernel.asm:
        names = {
            "vgpr_count": "registers",
            "private_segment_fixed_size": "stack",
            "vgpr_spill_count": "spills",
        }
        names["group_segment_fixed_size"] = "shared"
        found = re.findall(rf"\.({'|'.join(names)}):\s*(\d+)", kernel.asm["amdgcn"])
        return {names[name]: int(value) for name, value in found}
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    names = {"REG": "registers", "STACK": "stack", "LOCAL": "spills", "SHARED": "shared"}
    return {
        names[name]: int(value)
        for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report)
    }


@pytest.mark.parametrize(("architecture", "variant"), CASES, ids=str)
def test_no_spills(
    architecture: str, variant: Variant, record_property: Callable[[str, object], None]
) -> None:
    used = resources(compiled(architecture, variant))
    record_property("resources", f"{architecture} {variant}: {used}")  # conftest.py prints them
    assert used["stack"] == 0
    assert used["spills"] == 0


def disassembled(kernel: Any) -> list[str]:
    """Instructions and labels of NVIDIA's code."""
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [nvdisasm, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = (
        re.match(r"\s*(?:/\*[0-9a-f]+\*/\s+(.*?);|(\.L_x_\w+):)", x) for x in text.splitlines()
    )
    return [found[1] or found[2] for found in lines if found]


def vectors(code: list[str]) -> int:
    return sum(bool(re.search(r"\bLDG\S*\.128", line)) for line in code)


def innermost_loops(code: list[str]) -> list[list[str]]:
    places = {line: i for i, line in enumerate(code) if line.startswith(".L_x_")}
    jumps = ((re.search(r"BRA.*`\((\.L_x_\w+)\)", line), i) for i, line in enumerate(code))
    loops = [(places[to[1]], i) for to, i in jumps if to and places.get(to[1], i) < i]
    inner = [
        (a, b)
        for a, b in loops
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    ]
    return [code[a:b] for a, b in inner]


@pytest.mark.parametrize(("architecture", "variant"), KL_CASES, ids=str)
def test_no_spills_in_kl_rows(
    architecture: str, variant: Variant, record_property: Callable[[str, object], None]
) -> None:
    """None in sm_90's loops over full tiles; what is used between them may lie in memory on NVIDIA's GPUs."""
    kernel, config = compiled_kl(architecture, variant)
    used = resources(kernel)
    record_property("resources", f"{architecture} KL {variant}: {used}")
    assert used["spills"] == 0
    if not architecture.startswith("sm_"):
        assert used["stack"] == 0
    if architecture == "sm_90":
        turn = 2 * config.unroll  # loads of 16 bytes; a tile that the row does not fill takes 2
        loops = [loop for loop in innermost_loops(disassembled(kernel)) if vectors(loop) >= turn]
        assert loops or variant.vocab == 100  # a lane has less than 16 bytes of a tile
        assert not any(re.search(r"\b(LDL|STL)\b", line) for loop in loops for line in loop)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_full_tiles_of_kl_rows_are_read_and_written_by_vectors(dtype: str, aligned: bool) -> None:
    """At any address: of 16 bytes, without a mask."""
    kernel, _ = compiled_kl("sm_90", Variant(method="tnrf", dtype=dtype, aligned=aligned))
    ptx = kernel.asm["ptx"]
    loads = re.findall(r"^\s*ld\.global\.L1::evict_first\S*", ptx, re.M)
    stores = re.findall(r"^\s*st\.global\.L1::evict_first\S*", ptx, re.M)
    assert loads
    assert all(x.endswith(".v4.b32") for x in loads)
    assert stores
    assert all(x.endswith(".v4.b32") for x in stores)


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "variant", [Variant(method="nl+ll"), Variant(method="tnrf", ids=1)], ids=str
)
def test_no_warp_overwrites_what_another_is_yet_to_read(
    architecture: str, variant: Variant
) -> None:
    """In place, a row's set is read where the gradient will be: a barrier comes before any pass that writes it."""
    lines = compiled(architecture, variant).asm["ttgir"].splitlines()
    scalars = re.compile(r"tt\.load .*: !tt\.ptr<bf16>")  # of one token, by every warp for itself
    reads = [i for i, line in enumerate(lines) if scalars.search(line)]
    barriers = [i for i, line in enumerate(lines) if re.search(r"\b(ttg|gpu)\.barrier\b", line)]
    writes = [i for i, line in enumerate(lines) if "tt.store" in line and "%stored" in line]
    assert reads
    assert len(writes) >= 4  # full tiles and edges, of positive rows and of negative ones
    for read in reads:
        write = next(i for i in writes if i > read)
        assert any(read < i < write for i in barriers), lines[read]
