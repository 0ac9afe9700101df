"""The compiled module (csrc/bind.cpp). Addresses are integers; strides count elements.

The functions of CUDA are there where it was built with nvcc (csrc/bind.h).
"""

from tnt_kernels._call import RowCall

#: The names of a call's fields, in order.
ROW_CALL_FIELDS: list[str]
ROW_TENSORS_FIELDS: list[str]
SCALARS_FIELDS: list[str]
INTERFACE: int
ROW_COEFFICIENTS: int
ROW_STATISTICS: int
ROW_PARTIAL_SUMS: int
ROW_DIAGNOSTICS: int
compiler: str
version: str

def instruction_sets() -> list[str]: ...
def selected_instruction_set() -> str: ...
def select_instruction_set(name: str) -> None: ...
def openmp() -> bool: ...
def are_usual(
    logits: object,
    ref_logits: object,
    labels: object,
    weights: object,
    alpha: object,
    negative_ids: object,
    normalizer: object,
    /,
) -> bool: ...
def run_rows(call: RowCall, threads: int, /) -> None: ...
def run_rows_cuda(call: RowCall, device: int, stream: int, workspace: int, /) -> None: ...
def scale_rows_cuda(
    dtype: int,
    x: int,
    rows: int,
    columns: int,
    stride: int,
    factor: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def why_not_cuda(device: int, /) -> str: ...
def plan_cuda(dtype: int, vocab: int, pair: bool, device: int, /) -> tuple[int, int, int, int]: ...
def forget_plans() -> None: ...
