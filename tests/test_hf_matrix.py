"""Models × adapters × heads × layouts × methods: ``TNTTrainer`` against a loss written by hand in float64.

Every pair of values of two factors occurs, as far as it exists. A cell checks that a model is its own original at
the start, and that loss and gradients against another original are those of the texts one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import hf_by_hand as by_hand
import pytest
import torch
from hf_models import (
    ENCODER_DECODERS,
    IMAGE,
    KINDS,
    PATCHES,
    PIXELS,
    PROMPT_LEARNING,
    SAVED,
    TUNINGS,
    adapted,
    build,
    perturb,
)
from hf_tiny import config, tokenizer, trained
from torch import Tensor, nn

import tnt_kernels as tnt

Cell = dict[str, Any]
ALPHA = 1.5
FACTORS: dict[str, Sequence[Any]] = {
    "kind": KINDS,
    "tuning": TUNINGS,
    # "padded": examples that hold pads of their own, and an attention_mask that says so
    # "left": a tokenizer that pads so; the collator follows it where pads in front change nothing
    "layout": ("right", "left", "padded", "packed", "padding_free"),
    "method": tuple(by_hand.SIDES),
    "fused": (True, False),
}
ROWS = ((0, 1), (2, 3, 4))  #: which texts a packed row holds
LENGTHS = (6, 10, 4, 5, 5)
EVEN = (6, 8, 4, 5, 5)  #: such that packed rows have one length
UNPROMPTED = (0, 3)  #: their first token has a weight, but nothing predicts it


# --- The cells ------------------------------------------------------------------------------------


def impossible(cell: Mapping[str, Any]) -> str | None:
    """Why there is no such cell; None if there is."""
    kind, tuning, layout = cell["kind"], cell["tuning"], cell["layout"]
    several = layout in ("packed", "padding_free")
    if several and kind in ENCODER_DECODERS:
        return "the forward takes no position_ids, so nothing says where a text begins"
    if several and kind == "falcon":
        return "transformers makes its mask without position_ids, so texts of a row see each other"
    if several and tuning == "prefix":
        return "the prefix is a cache, and behind a cache transformers looks for no texts in a row"
    if several and tuning == "prompt":
        return "PEFT drops the position_ids that say where a text begins"
    if (kind, tuning) == ("mixtral", "prefix"):
        return "transformers' load balancing fails: the mask covers the prefix, the router does not"
    if tuning == "prompt" and kind not in ("gpt2", "mixtral", "t5"):
        return "the same for all: one plain model, one that routes virtual tokens, one that encodes them"
    return None


def pairwise(
    factors: Mapping[str, Sequence[Any]], exists: Callable[[Mapping[str, Any]], bool]
) -> list[Cell]:
    """Existing cells that hold every pair of values that any existing cell holds; greedy, always the same."""
    cells = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    pairs = [(cell, {*combinations(cell.items(), 2)}) for cell in cells if exists(cell)]
    missing, chosen = set().union(*(held for _, held in pairs)), []
    while missing:
        cell, held = max(pairs, key=lambda pair: len(pair[1] & missing))
        chosen.append(cell)
        missing -= held
    return chosen


CELLS = pairwise(FACTORS, lambda cell: impossible(cell) is None)


def name(cell: Cell) -> str:
    head = "fused" if cell["fused"] else "logits"
    return "-".join((*(cell[factor] for factor in list(FACTORS)[:-1]), head))


# --- Texts ----------------------------------------------------------------------------------------


def texts_of(cell: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Annotated texts of uneven lengths: prompts, and weights of every kind; every second one has ``negative_ids``."""
    kind, packed = cell["kind"], cell["layout"] == "packed"
    generator = torch.Generator().manual_seed(5)
    texts = []
    # Without a mask the pads of a packed row are routed as well, and count in the load balancing.
    for i, length in enumerate(EVEN if packed and kind == "mixtral" else LENGTHS):
        ids = torch.randint(3, IMAGE, (length,), generator=generator)
        weights = torch.tensor([1.0, -1.0, 1.0, -0.5, 0.5, 1.0, 0.0, 2.0, -1.0, 1.0])[:length]
        if i not in UNPROMPTED:
            weights[: length // 3] = 0.0
        text = {"input_ids": ids, "labels": ids, "weights": weights}
        if i % 2:
            draw = torch.randint(-IMAGE, IMAGE, (length, 2), generator=generator)
            text["negative_ids"] = draw.clamp(min=-1)
        if kind in ENCODER_DECODERS:
            text["input_ids"] = torch.randint(3, IMAGE, (11 - length,), generator=generator)
        if kind == "llava" and not (packed and i not in (row[0] for row in ROWS)):
            patches = torch.full((PATCHES,), IMAGE)
            ids = torch.cat((patches, ids))
            weights = torch.cat((torch.zeros(PATCHES), weights))
            text |= {"input_ids": ids, "labels": ids, "weights": weights}
            if "negative_ids" in text:
                none = torch.full((PATCHES, 2), -1)
                text["negative_ids"] = torch.cat((none, text["negative_ids"]))
            text["pixel_values"] = torch.rand(PIXELS, generator=generator)
        texts.append(text)
    return texts


def joined(texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One packed row; its images are those of the first text."""
    row = {key: torch.cat([text[key] for text in texts]) for key in ("input_ids", "labels", "weights")}  # fmt: skip
    row["position_ids"] = torch.cat([torch.arange(len(text["input_ids"])) for text in texts])
    none = [torch.full((len(text["labels"]), 2), -1) for text in texts]
    row["negative_ids"] = torch.cat(
        [text.get("negative_ids", ids) for text, ids in zip(texts, none, strict=True)]
    )
    if "pixel_values" in texts[0]:
        row["pixel_values"] = texts[0]["pixel_values"]
    return row


def positioned(cell: Mapping[str, Any]) -> bool:
    """Whether pads may stand in front: position_ids say where a text begins, and nothing is to stand next to it."""
    return cell["kind"] not in ENCODER_DECODERS and cell["tuning"] not in PROMPT_LEARNING


def padded(text: Mapping[str, Tensor], pads: int, cell: Mapping[str, Any]) -> dict[str, Tensor]:
    """A text that has pads of its own, in front where positions are read; an encoder-decoder's, in its source."""
    # An id like any other, which the mask alone hides.
    columns = {"input_ids": 5, "attention_mask": 0}
    found = {**text, "attention_mask": torch.ones_like(text["input_ids"])}
    if cell["kind"] not in ENCODER_DECODERS:
        columns |= {"labels": -100, "weights": 0, "negative_ids": -1, "position_ids": 0}
    if positioned(cell):
        found["position_ids"] = torch.arange(len(text["input_ids"]))
    for key, value in columns.items():
        if key in found:
            fill = found[key].new_full((pads, *found[key].shape[1:]), value)
            found[key] = torch.cat((fill, found[key]) if positioned(cell) else (found[key], fill))
    return found


def batch_of(cell: Mapping[str, Any], model: Any, texts: Sequence[Any]) -> dict[str, Tensor]:
    """What the collator makes of the texts in the cell's layout."""
    layout, examples = cell["layout"], list(texts)
    if layout == "packed":
        examples = [joined([texts[i] for i in row]) for row in ROWS]
    elif layout == "padded":
        examples = [padded(text, i % 3, cell) for i, text in enumerate(texts)]
    words = tokenizer(padding_side="left") if layout == "left" else None
    collate = tnt.hf.TNTDataCollator(words, model=model, padding_free=layout == "padding_free")
    batch = collate(examples)
    assert len(batch["input_ids"]) == (1 if layout == "padding_free" else len(examples))
    assert ("attention_mask" in batch) == (layout not in ("packed", "padding_free"))
    if layout == "left" and positioned(cell):
        assert bool(batch["attention_mask"][:, -1].all())
    return batch


# --- Checks ---------------------------------------------------------------------------------------


def logged(trainer: Any, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """What the trainer logs of one batch."""
    trainer.compute_loss(trainer.model, batch)
    trainer.log({"loss": 0.0})
    found: dict[str, float] = trainer.state.log_history[-1]
    return found


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: x.grad for n, x in model.named_parameters() if x.requires_grad and x.grad is not None}  # fmt: skip


def twin(cell: Mapping[str, Any], model: nn.Module, **options: Any) -> Any:
    """Another model of the same values that no trainer has touched, without dropout."""
    other = adapted(build(cell["kind"]), cell["kind"], cell["tuning"], **options)
    other.load_state_dict(model.state_dict())
    return other.eval()


def assert_by_hand(
    trainer: Any, batch: Mapping[str, Tensor], copy: Any, original: Any, texts: Any, method: str
) -> None:
    """Loss and gradients are those of ``copy``, the same model, by hand."""
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    expected = by_hand.loss(copy, original.eval(), texts, method, ALPHA)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = gradients(model, loss), gradients(copy, expected)
    whole = torch.stack([x.norm() for x in theirs.values()]).norm()
    assert whole > 0
    for key, x in theirs.items():
        # What a softmax takes away again, as the bias of keys, has a gradient of roundings alone.
        assert (ours[key] - x).norm() <= 1e-6 * x.norm() + 1e-9 * whole, key
    assert all(x.norm() <= 1e-9 * whole for key, x in ours.items() if key not in theirs)


def test_the_cells() -> None:
    """Few enough, and with all pairs that exist."""
    assert len(CELLS) <= 60
    assert {cell["kind"] for cell in CELLS} == {*KINDS}
    held = {pair for cell in CELLS for pair in combinations(cell.items(), 2)}
    cells = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    for cell in cells:
        assert impossible(cell) or {*combinations(cell.items(), 2)} <= held


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_against_the_loss_by_hand(cell: Cell, tmp_path: Path) -> None:
    kind, tuning, method = cell["kind"], cell["tuning"], cell["method"]
    model, texts = adapted(build(kind), kind, tuning), texts_of(cell)
    args = config(tmp_path, method=method, alpha=ALPHA, fused_linear=cell["fused"])
    batch = batch_of(cell, model, texts)
    trainer = tnt.hf.TNTTrainer(model, args)
    if tuning not in PROMPT_LEARNING:  # which change a model from the start
        logs, sides = logged(trainer, batch), by_hand.SIDES[method]
        if sides[1] == "forward":
            assert abs(logs["positive_kl"]) < 1e-6
        if sides[0] != "unlikelihood":
            assert logs["negative_mass"] == pytest.approx(logs["ref_negative_mass"], rel=1e-6)
    original = build(kind, seed=1 if tuning == "full" else 0)
    if tuning == "full":
        trainer = tnt.hf.TNTTrainer(model, args, ref_model=build(kind, seed=1))
    else:
        perturb(model)
    assert_by_hand(trainer, batch, twin(cell, model), original, texts, method)
    behind = kind == "mbart" or (tuning == "lora+saved" and "lm_head" in SAVED[kind])
    assert (trainer._first_batch.head_math is not None) == (cell["fused"] and not behind)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("tuning", ["full", "lora", "lora+saved"])
def test_a_given_reference_keeps_its_adapters(tuning: str, fused: bool, tmp_path: Path) -> None:
    cell = {"kind": "falcon", "tuning": tuning, "layout": "right"}
    model, texts = adapted(build("falcon"), "falcon", tuning), texts_of(cell)
    adapters = {**cell, "tuning": "lora+saved"}
    given = adapted(build("falcon", seed=1), "falcon", "lora+saved")
    perturb(given, seed=4)
    perturb(model)
    original = twin(adapters, given)
    args = config(tmp_path, method="tnff", alpha=ALPHA, fused_linear=fused)
    trainer = tnt.hf.TNTTrainer(model, args, ref_model=given)
    batch = batch_of(cell, model, texts)
    assert_by_hand(trainer, batch, twin(cell, model), original, texts, "tnff")
    assert (trainer._first_batch.head_math is not None) == fused


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("tuning", ["lora", "lora+saved", "prefix"])
def test_adapters_of_the_start_as_the_reference(tuning: str, fused: bool, tmp_path: Path) -> None:
    """``adapter_reference="start"``: what was trained already is what the update is held against."""
    cell = {"kind": "gemma3", "tuning": tuning, "layout": "right"}
    model, texts = adapted(build("gemma3"), "gemma3", tuning), texts_of(cell)
    perturb(model, seed=4)
    original, batch = twin(cell, model), batch_of(cell, model, texts)
    args = config(
        tmp_path, method="tnrf", alpha=ALPHA, fused_linear=fused, adapter_reference="start"
    )
    trainer = tnt.hf.TNTTrainer(model, args)
    assert abs(logged(trainer, batch)["positive_kl"]) < 1e-6
    perturb(model)
    assert_by_hand(trainer, batch, twin(cell, model), original, texts, "tnrf")
    assert (trainer._first_batch.head_math is not None) == fused


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("trained_too", ["all", "lora_only", "by hand"])
def test_base_weights_that_train(trained_too: str, fused: bool, tmp_path: Path) -> None:
    """The original keeps the values that they had at the start."""
    cell = {"kind": "gpt2", "tuning": "lora", "layout": "right"}
    options = {} if trained_too == "by hand" else {"bias": trained_too}

    def made() -> Any:
        model = adapted(build("gpt2"), "gpt2", "lora", **options)
        if trained_too == "by hand":
            model.get_base_model().transformer.h[1].requires_grad_(True)
        return model

    model, texts = made(), texts_of(cell)
    batch = batch_of(cell, model, texts)
    start = {n: x.detach().clone() for n, x in model.named_parameters() if x.requires_grad}
    args = config(tmp_path, method="tnff", alpha=ALPHA, fused_linear=fused, max_steps=3)
    trainer = trained(model, args, texts, data_collator=tnt.hf.TNTDataCollator())
    moved = [n for n, x in model.named_parameters() if n in start and not torch.equal(x, start[n])]
    assert any("lora" not in n for n in moved)
    copy = made()
    copy.load_state_dict(model.state_dict())
    assert_by_hand(trainer, batch, copy.eval(), build("gpt2"), texts, "tnff")
    assert (trainer._first_batch.head_math is not None) == fused


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_pads_in_front_with_a_mask_alone(kind: str, tmp_path: Path) -> None:
    """As a tokenizer returns them: where a text begins follows from the mask."""
    cell = {"kind": kind, "tuning": "full", "layout": "padded"}
    model, texts = build(kind), texts_of(cell)
    examples = [padded(text, i % 3, cell) for i, text in enumerate(texts)]
    for example in examples:
        del example["position_ids"]
    trainer = tnt.hf.TNTTrainer(
        model, config(tmp_path, method="tnff", alpha=ALPHA), ref_model=build(kind, seed=1)
    )
    batch = tnt.hf.TNTDataCollator(model=model)(examples)
    assert_by_hand(trainer, batch, twin(cell, model), build(kind, seed=1), texts, "tnff")


REFUSED = [
    (kind, tuning, layout)
    for kind, tuning in (
        ("gpt2", "prefix"), ("gpt2", "prompt"), ("t5", "full"), ("mbart", "full"), ("falcon", "full"),
    )
    for layout in ("packed", "padding_free")
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tuning", "layout"), REFUSED)
def test_what_is_impossible_is_refused(kind: str, tuning: str, layout: str, tmp_path: Path) -> None:
    cell = {"kind": kind, "tuning": tuning, "layout": layout}
    assert impossible(cell)
    model, texts = adapted(build(kind), kind, tuning), texts_of(cell)

    def step() -> None:
        batch = batch_of(cell, model, texts)
        tnt.hf.TNTTrainer(model, config(tmp_path)).compute_loss(model, batch)

    with pytest.raises(ValueError, match=r"position_ids|padding_free"):
        step()
