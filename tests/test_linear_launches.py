"""What ``linear_tnt_loss`` launches on a GPU, and what it allocates: counted on tensors without memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from oracle import BF16, F32
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tnt_kernels import _operators, backends
from tnt_kernels._call import LossCall, RowCall, RowTensors
from tnt_kernels._linear import matmul, sizes
from tnt_kernels._linear.operators import WantedGradients, linear_losses
from tnt_kernels._linear.plan import LinearScalars, LinearTensors
from tnt_kernels._scalars import Scalars

HIDDEN, VOCAB = 64, 1000
VIEWS = {
    "slice",
    "t",
    "transpose",
    "view",
    "split",
    "alias",
    "detach",
    "select",
    "unsqueeze",
    "expand",
}
NEW = {"empty", "new_empty", "empty_strided", "new_zeros", "new_full", "zeros", "full"}


class Recorder(TorchDispatchMode):
    """Counts operators that do something on the device, and those that ask it for memory."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.allocations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in NEW:
            self.allocations[name] += 1
        elif name not in VIEWS:
            self.launches[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """In which matmuls and the backend's launches only count."""
    found = Recorder()

    def count(name: str) -> Any:
        def counted(*_: Any, **__: Any) -> None:
            found.launches[name] += 1

        return counted

    def launch(call: RowCall) -> None:
        """``loss`` a row and a gradient at once: with no normaliser to find, and no sum to write."""
        assert call.scalars.reduction == "none"
        assert call.loss is not None
        assert call.loss.shape == (len(call.logits),)
        assert call.coefficients is None
        found.launches["loss"] += 1

    for module in (sizes, matmul):
        monkeypatch.setattr(module, "keeps_float32", lambda device_type: True)
    monkeypatch.setattr(matmul, "adds_to_float32", lambda device_type: True)
    monkeypatch.setattr(matmul, "_wide_mm", count("matmul"))
    monkeypatch.setattr(matmul, "_wide_addmm_", count("matmul"))
    monkeypatch.setattr(backends.BACKENDS["triton"], "launch", launch)
    # There is no autocast of these tensors, and all begin at the same place.
    monkeypatch.setattr(_operators, "check_no_overlap", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return found


def run(
    recorder: Recorder, rows: int, chunk_size: int, *, shared: bool = False, trained: bool = True,
    most: int | None = None, dtype: torch.dtype = BF16, rounds_pairs: bool = False,
) -> tuple[Counter[str], Counter[str]]:  # fmt: skip
    """Launches and allocations of a call; ``most``: ``max_active_rows``, all of them where it is None."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, weight, ref_hidden = new(rows, HIDDEN), new(VOCAB, HIDDEN), new(rows, HIDDEN)
    ref_weight = weight.detach() if shared else new(VOCAB, HIDDEN)
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    weights = torch.empty(rows, device="meta")
    t = LinearTensors(hidden, weight, None, ref_hidden, ref_weight, None)
    linear = LinearScalars(None, None, 1.0, 1.0, VOCAB, chunk_size, most or rows, rounds_pairs)
    tensors = RowTensors(None, labels, weights, None, None, None)
    call = LossCall(tensors, Scalars(1, 1), "triton", False, False, None)
    recorder.launches.clear()
    recorder.allocations.clear()
    with recorder:
        linear_losses._function(t, linear, call, WantedGradients(True, trained, False))
    return recorder.launches.copy(), recorder.allocations.copy()


@pytest.mark.parametrize("rounds_pairs", [False, True])
@pytest.mark.parametrize("most", [None, 2048])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_but_the_loss_between_the_matmuls(
    recorder: Recorder, shared: bool, trained: bool, most: int | None, rounds_pairs: bool
) -> None:
    """A chunk more is two matmuls and the loss more, with nothing gathered, summed, cast or allocated; and the matmuls
    of the gradient where they do not wait for other chunks."""
    if rounds_pairs and not shared:
        pytest.skip("of a shared head alone")
    several, one = (
        run(recorder, 4096, (most or 4096) // n, shared=shared, trained=trained, most=most, rounds_pairs=rounds_pairs)
        for n in (8, 4)
    )  # fmt: skip
    more = several[0] - one[0]
    assert more.pop("loss") == 4
    products = sum(more.pop(name, 0) for name in ("matmul", "addmm"))
    assert products == 8 + (
        0 if trained else 4
    )  # the reference, the policy; hidden's gradient of a frozen head
    # The float32 product of few rows is rounded.
    assert not more or (not trained and more == {"copy_": 4})
    assert not several[1] - one[1] or (not trained and several[1] - one[1] == {"new_empty": 4})


def test_one_matmul_writes_hidden_s_gradient_in_its_place(recorder: Recorder) -> None:
    """Of rows enough: without a product, a cast and a copy of its own."""
    rows = matmul._FEW_ENTRIES // HIDDEN
    launches, _ = run(recorder, rows, rows)
    assert launches["copy_"] == launches["index_copy_"] == 0
    assert (launches["addmm"], launches["addmm_"]) == (1, 1)  # hidden's, the weight's


def test_what_is_not_asked_for_is_not_waited_for(recorder: Recorder) -> None:
    """With ``max_active_rows`` no number is read from the device; without, it is, before anything else is launched."""
    run(recorder, 256, 64, most=128)
    plain = LinearScalars(None, None, 1.0, 1.0, VOCAB, None, None, False)
    hidden, weight = (torch.empty(n, HIDDEN, dtype=F32, device="meta") for n in (8, VOCAB))
    t = LinearTensors(hidden, weight, None, hidden, weight, None)
    labels = torch.empty(8, dtype=torch.int64, device="meta")
    call = LossCall(
        RowTensors(None, labels, None, None, None, None),
        Scalars(1, 1),
        "triton",
        False,
        False,
        None,
    )
    recorder.launches.clear()
    with recorder, pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        linear_losses._function(t, plain, call, WantedGradients(True, True, False))
    assert set(recorder.launches) <= {"ne", "sum", "_local_scalar_dense"}
