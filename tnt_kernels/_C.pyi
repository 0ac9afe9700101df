"""The compiled module (csrc/bind.cpp). Addresses are integers, 0 for what is absent; strides count elements.

The functions that end in "cuda" are there where it was built with nvcc (csrc/bind_cuda.h).
"""

INTERFACE: int
ROW_COEFFICIENTS: int
ROW_STATISTICS: int
ROW_PARTS: int
compiler: str
version: str

def instruction_sets() -> list[str]: ...
def selected_instruction_set() -> str: ...
def select_instruction_set(name: str) -> None: ...
def openmp() -> bool: ...
def run_rows(
    dtype: int,
    rows: int,
    vocab: int,
    vocab_offset: int,
    vocab_size: int,
    logits: int,
    logits_stride: int,
    ref_logits: int,
    ref_logits_stride: int,
    labels: int,
    weights: int,
    alpha: int,
    alpha_stride: int,
    alpha_value: float,
    negative_ids: int,
    negative_ids_stride: int,
    negative_ids_count: int,
    positive_loss: int,
    negative_loss: int,
    uniform_smoothing: bool,
    eps: float,
    nl_floor: float,
    temperature: float,
    ignore_index: int,
    reduction: int,
    normalizer: int,
    has_normalizer: bool,
    normalizer_value: float,
    statistics: int,
    gathered: int,
    gathered_stride: int,
    shards: int,
    parts: int,
    totals: int,
    loss: int,
    row_stats: int,
    coefficients: int,
    grad: int,
    grad_stride: int,
    grad_dtype: int,
    upstream: int,
    upstream_stride: int,
    threads: int,
    /,
) -> None: ...
def run_rows_cuda(
    dtype: int,
    rows: int,
    vocab: int,
    vocab_offset: int,
    vocab_size: int,
    logits: int,
    logits_stride: int,
    ref_logits: int,
    ref_logits_stride: int,
    labels: int,
    weights: int,
    alpha: int,
    alpha_stride: int,
    alpha_value: float,
    negative_ids: int,
    negative_ids_stride: int,
    negative_ids_count: int,
    positive_loss: int,
    negative_loss: int,
    uniform_smoothing: bool,
    eps: float,
    nl_floor: float,
    temperature: float,
    ignore_index: int,
    reduction: int,
    normalizer: int,
    has_normalizer: bool,
    normalizer_value: float,
    statistics: int,
    gathered: int,
    gathered_stride: int,
    shards: int,
    parts: int,
    totals: int,
    loss: int,
    row_stats: int,
    coefficients: int,
    grad: int,
    grad_stride: int,
    grad_dtype: int,
    upstream: int,
    upstream_stride: int,
    device: int,
    stream: int,
    workspace: int,
    /,
) -> None: ...
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
def forget_plans() -> None: ...
