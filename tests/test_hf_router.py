"""Mixtures of experts: their auxiliary loss is added as their own forward adds it."""

from __future__ import annotations

import copy
import dataclasses
import types

import pytest
import torch
from hf_tiny import VOCAB, annotated, assert_same, config, parameters, tiny, trained

import tnt_kernels as tnt
from tnt_kernels.hf.router import auxiliary_loss

transformers = pytest.importorskip("transformers")


def experts(coefficient=0.5, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "initializer_range": 0.3,
        "output_router_logits": True, "router_aux_loss_coef": coefficient,
        "experts_implementation": "eager",  # the only one in float64
    }  # fmt: skip
    settings = transformers.MixtralConfig(**{**sizes, **options})
    return transformers.MixtralForCausalLM(settings).double()


def own_loss(model, batch):
    """What the model's own forward adds to its cross-entropy."""
    inputs = {n: x for n, x in batch.items() if n not in ("labels", "weights", "negative_ids")}
    outputs = model(**inputs, labels=batch["labels"])
    logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return outputs.loss - plain


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_it_is_what_the_models_own_forward_adds(fused, tmp_path):
    model = experts()
    examples = annotated(8)
    trainer = tnt.hf.TNTTrainer(copy.deepcopy(model), config(tmp_path, fused_linear=fused))
    batch = trainer.data_collator(examples)
    trainer.compute_loss(trainer.model, batch).backward()
    assert (trainer._first_batch.head_math is not None) == fused
    model.zero_grad()
    expected = own_loss(trainer.model.eval(), batch)
    assert expected.item() > 1e-3
    # At p = q the positive rows have no gradient; what is left is that of the negatives and this one.
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.model.config.output_router_logits = False
    without = trainer.compute_loss(trainer.model, batch)
    assert (loss - without).item() == pytest.approx(expected.item(), rel=1e-5)
    parts = torch.autograd.grad(loss - without, list(trainer.model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(trainer.model.parameters()), allow_unused=True)
    compared = 0
    for one, other in zip(parts, wanted, strict=True):
        if other is not None and other.norm() > 1e-6:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
            compared += 1
    assert compared


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_the_factor_counts_and_the_loss_is_logged(fused, tmp_path):
    updates, logs, start = [], [], parameters(experts())
    for coefficient in (0.0, 10.0):
        args = config(tmp_path, fused_linear=fused)
        trainer = trained(experts(coefficient), args, annotated(8), eval_dataset=annotated(8))
        updates.append(parameters(trainer.model))
        logs.append(trainer.state.log_history[0])
        metrics = trainer.evaluate()
        assert metrics["eval_aux_loss"] > 0
    routers = [name for name in start if "gate" in name and "experts" not in name]
    assert routers
    for name in routers:
        apart = (updates[1][name] - updates[0][name]).norm()
        assert apart > 0.1 * (updates[1][name] - start[name]).norm(), name
    assert logs[0]["aux_loss"] == pytest.approx(logs[1]["aux_loss"], rel=1e-9)
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(10 * logs[1]["aux_loss"], rel=1e-5)
    quiet = trained(experts(output_router_logits=False), config(tmp_path), annotated(8))
    assert "aux_loss" not in quiet.state.log_history[0]


def test_micro_batches_share_it(tmp_path):
    """The mean over the micro-batches of a step; of equal ones, what one batch has."""
    start, updates = parameters(experts()), []
    one = annotated(1) * 2
    for steps in (1, 3):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": steps}
        args = config(tmp_path, **options)
        trainer = trained(experts(), args, one * steps, ref_model=experts(seed=1))
        updates.append(parameters(trainer.model))
    assert_same(*updates, start, 1e-6)


def test_a_loss_function_adds_it():
    model = experts(10.0)
    batch = tnt.hf.TNTDataCollator(model=model)(annotated(8))
    losses = []
    for routed in (True, False):
        model.config.output_router_logits = routed
        function = tnt.hf.compute_loss_func(model, experts(seed=1))
        outputs = model(**{n: x for n, x in batch.items() if n != "labels"})
        losses.append(function(outputs, batch["labels"]).item())
        function.remove()
        if routed:
            expected = 10.0 * outputs.aux_loss.item()
    assert losses[0] - losses[1] == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_added_is_refused():
    @dataclasses.dataclass
    class Outputs:
        aux_loss: torch.Tensor | None = None

    model = experts()
    message = "output_router_logits: True, but the forward of MixtralForCausalLM gives no aux_loss"
    with pytest.raises(ValueError, match=message):
        auxiliary_loss(model, Outputs())
    settings = types.SimpleNamespace(output_router_logits=True)
    with pytest.raises(ValueError, match=r"there is no factor on it \(router_aux_loss_coef or"):
        auxiliary_loss(types.SimpleNamespace(config=settings), Outputs(torch.ones(())))
    model.config.output_router_logits = False
    assert auxiliary_loss(model, Outputs()) is None
    assert auxiliary_loss(tiny("llama"), Outputs()) is None
