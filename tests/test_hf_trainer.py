"""``TNTTrainer``: gradients against the loss by hand, references, evaluation, logs, saving."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hf_tiny import (
    KINDS,
    UNWANTED,
    VOCAB,
    annotated,
    assert_same,
    config,
    parameters,
    tiny,
    tokenizer,
    trained,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode

import tnt_kernels as tnt
from tnt_kernels.hf.dropout import disable_dropout
from tnt_kernels.hf.original import fingerprint

transformers = pytest.importorskip("transformers")


def by_hand(model, original, examples, **keywords):
    """The gradient step of one batch of all examples, in a plain loop."""
    collate = tnt.hf.TNTDataCollator(model=model)
    batch = collate(examples)
    labels, weights = batch.pop("labels"), batch.pop("weights")
    negative_ids = batch.pop("negative_ids", None)
    if not model.config.is_encoder_decoder:
        labels, weights = labels.roll(-1, 1), weights.roll(-1, 1)
        weights[:, -1] = 0
        negative_ids = None if negative_ids is None else negative_ids.roll(-1, 1)
    with torch.no_grad():
        ref_logits = original.eval()(**batch).logits
    logits = model.eval()(**batch).logits
    loss = tnt.tnt_loss(logits, ref_logits, labels, weights, negative_ids=negative_ids, **keywords)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for x, gradient in zip(model.parameters(), gradients, strict=True):
            x -= 0.1 * gradient
    return loss.item(), parameters(model)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_loss(kind, fused, tmp_path):
    """k micro-batches of uneven lengths, one batch, and the plain loop: the same to 1e-6."""
    model = tiny(kind).double()
    original = tiny(kind, seed=1).double()
    start = parameters(model)
    examples = annotated(8, encoder_decoder=kind == "t5", negative_ids=True)
    loss, expected = by_hand(copy.deepcopy(model), original, examples, method="tnrf", alpha=2.0)
    for size, steps in ((8, 1), (2, 4), (3, 3)):
        args = config(
            tmp_path, fused_linear=fused, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            method="tnrf", alpha=2.0,
        )  # fmt: skip
        trainer = trained(copy.deepcopy(model), args, examples, ref_model=copy.deepcopy(original))
        assert (trainer._first_batch.head_math is not None) == fused
        assert_same(expected, parameters(trainer.model), start, 1e-6)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_each_trunk_runs_once(fused, tmp_path):
    trainer = tnt.hf.TNTTrainer(tiny("llama"), config(tmp_path, fused_linear=fused))
    batch, runs = tnt.hf.TNTDataCollator()(annotated(8)), []
    for model in (trainer.model, trainer.ref_model):
        model.model.register_forward_hook(lambda module, *_: runs.append(module))
    trainer.compute_loss(trainer.model, batch)  # the first one probes
    runs.clear()
    trainer.compute_loss(trainer.model, batch).backward()
    assert runs == [trainer.ref_model.model, trainer.model.model]
    assert "forward" not in vars(trainer.model)  # nothing is left behind


def test_reference_is_the_model_at_the_start(tmp_path):
    model, examples = tiny("llama"), annotated(8)
    start = parameters(model)
    trainer = trained(model, config(tmp_path, max_steps=3), examples)
    copied = dict(trainer.ref_model.named_parameters())
    assert all(
        torch.equal(copied[name], x) and not copied[name].requires_grad for name, x in start.items()
    )
    assert not trainer.ref_model.training
    assert any(not torch.equal(x, start[name]) for name, x in parameters(model).items())


def test_dropout_is_off_in_both(tmp_path):
    model = tiny("t5", dropout_rate=0.5)
    losses = []
    for _ in range(2):
        trainer = trained(
            copy.deepcopy(model), config(tmp_path), annotated(8, encoder_decoder=True)
        )
        losses.append(trainer.state.log_history[0]["loss"])
        # p = q at the start; attention alone rounds otherwise when it needs gradients
        assert trainer.state.log_history[0]["positive_kl"] < 1e-10
    assert losses[0] == losses[1]
    args = config(tmp_path, disable_dropout=False)
    trainer = trained(copy.deepcopy(model), args, annotated(8, encoder_decoder=True))
    assert trainer.state.log_history[0]["positive_kl"] > 0.01


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_precomputed_reference(kind, tmp_path):
    model, original = tiny(kind), tiny(kind, seed=1)
    examples, start = annotated(8, encoder_decoder=kind == "t5"), parameters(model)
    expected = trained(
        copy.deepcopy(model), config(tmp_path), examples, ref_model=copy.deepcopy(original)
    )
    collate = tnt.hf.TNTDataCollator(model=model)
    more = tnt.hf.precompute_reference(original, examples, collate, batch_size=3)
    assert [len(x["ref_hidden_states"]) for x in more] == [len(x["labels"]) for x in examples]
    args = config(tmp_path, precomputed_reference=True)
    trainer = trained(copy.deepcopy(model), args, more, ref_model=original)
    assert trainer.ref_model is None
    assert_same(parameters(expected.model), parameters(trainer.model), start, 1e-5)
    with pytest.raises(ValueError, match="no ref_hidden_states among its columns"):
        trained(copy.deepcopy(model), args, examples, ref_model=original)


def test_padded_vocabularies_may_differ(tmp_path):
    model, original = tiny("gpt2"), tiny("gpt2", seed=1)
    start, examples = parameters(model), annotated(8)
    padded = copy.deepcopy(original)
    padded.resize_token_embeddings(VOCAB + 28)
    updates = []
    for ref_model in (original, padded):
        for fused in (True, False):
            args = config(tmp_path, fused_linear=fused)
            trainer = trained(
                copy.deepcopy(model), args, examples, ref_model=copy.deepcopy(ref_model)
            )
            updates.append(parameters(trainer.model))
    for update in updates[1:]:
        assert_same(updates[0], update, start, 1e-4)
    with pytest.raises(ValueError, match="input_ids: holds the id 100"):
        trained(
            padded, config(tmp_path), [{"input_ids": [5, 100], "weights": [1, 1]}], ref_model=model
        )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_adapters_disabled_are_the_reference(fused, tmp_path):
    peft = pytest.importorskip("peft")
    examples = annotated(8)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny("llama"), lora)
    expected = copy.deepcopy(wrapped)
    start = parameters(wrapped)
    by_model = trained(
        expected, config(tmp_path, fused_linear=fused), examples, ref_model=tiny("llama")
    )
    trainer = trained(wrapped, config(tmp_path, fused_linear=fused), examples)
    assert trainer.ref_model is None  # one set of weights
    assert (trainer._first_batch.head_math is not None) == fused
    assert_same(parameters(by_model.model), parameters(trainer.model), start, 1e-5)
    again = peft.get_peft_model(tiny("llama"), lora)
    assert trainer._reference.fingerprint == fingerprint(again, without_adapters=True)


def test_an_adapter_on_the_head_takes_the_logits(tmp_path, said):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    trainer = trained(peft.get_peft_model(tiny("llama"), lora), config(tmp_path), annotated(8))
    assert trainer._first_batch.head_math is None
    assert sum("fused_linear" in message for message in said()) == 1


# --- What stands behind the head ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}, (1.0, 5.0)),
        ("gemma2", {"final_logit_softcapping": None}, (1.0, None)),
        ("cohere", {"logit_scale": 0.25}, (0.25, None)),
        ("granite", {"logits_scaling": 4.0}, (0.25, None)),
        ("t5", {"tie_word_embeddings": True}, (1.0, None)),
        ("bart", {}, (1.0, None)),
    ],
)
def test_what_is_behind_the_head_is_honoured(kind, options, expected, tmp_path):
    model = tiny(kind, **options)
    examples = annotated(8, encoder_decoder=kind in ("t5", "bart"))
    start, updates = parameters(model), []
    for fused in (True, False):
        args = config(tmp_path, fused_linear=fused)
        trainer = trained(
            copy.deepcopy(model), args, examples, ref_model=tiny(kind, seed=1, **options)
        )
        updates.append(parameters(trainer.model))
        assert trainer._first_batch.head_math == ((expected, expected) if fused else None)
    assert_same(updates[1], updates[0], start, 1e-3)


def test_what_is_behind_the_head_and_unknown_takes_the_logits(tmp_path, said):
    model, start = tiny("bart"), None
    model.final_logits_bias.normal_()
    start, updates = parameters(model), []
    for fused in (True, False):
        args = config(tmp_path, fused_linear=fused, max_steps=2)
        trainer = trained(copy.deepcopy(model), args, annotated(8, encoder_decoder=True))
        assert trainer._first_batch.head_math is None
        updates.append(parameters(trainer.model))
    assert_same(updates[1], updates[0], start, 1e-6)
    assert sum("fused_linear" in message for message in said()) == 1


def test_mixed_precision_and_checkpointing(tmp_path):
    model, start = tiny("llama"), None
    start, updates = parameters(model), []
    for options in (
        {},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"bf16": True, "fused_linear": False},
    ):
        trainer = trained(copy.deepcopy(model), config(tmp_path, **options), annotated(8),
                          ref_model=tiny("llama", seed=1))  # fmt: skip
        updates.append(parameters(trainer.model))
        assert (trainer._first_batch.head_math is None) == ("fused_linear" in options)
    assert_same(updates[0], updates[1], start, 1e-6)
    assert_same(updates[0], updates[2], start, 0.1)
    assert_same(updates[2], updates[3], start, 0.1)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_16_bits(dtype, fused, tmp_path):
    """Their gradients, against those of the same weights in float32."""
    models = [tiny("llama").to(dtype), tiny("llama", seed=1).to(dtype)]
    found = []
    for kind in (dtype, torch.float32):
        model, original = (copy.deepcopy(x).to(kind) for x in models)
        trainer = tnt.hf.TNTTrainer(model, config(tmp_path, fused_linear=fused), ref_model=original)
        trainer.compute_loss(model, trainer.data_collator(annotated(8))).backward()
        assert (trainer._first_batch.head_math is not None) == fused
        found.append({name: x.grad.float() for name, x in model.named_parameters()})
    nothing = {name: torch.zeros_like(x) for name, x in found[0].items()}
    assert_same(found[1], found[0], nothing, {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype])


def test_compiled(tmp_path, said):
    """The model is one graph (and one for other lengths); what is around it is not compiled."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    start, updates = parameters(tiny("gpt2")), []
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    for options in ({}, compiled):
        args = config(tmp_path, max_steps=3, **options)
        trainer = trained(tiny("gpt2"), args, annotated(24), ref_model=tiny("gpt2", seed=1))
        updates.append(parameters(trainer.model))
    assert_same(*updates, start, 1e-4)
    assert 0 < counters["stats"]["unique_graphs"] <= 2
    assert trainer._first_batch.head_math is None
    assert sum("torch_compile" in message for message in said()) == 1
    torch.compiler.reset()


def test_a_model_that_needs_its_logits_in_backward(tmp_path):
    """As one that ends with a tanh does. It is an error to write over them, and ``inplace=False`` says not to."""
    model = tiny("gpt2")
    start = parameters(model)
    model.lm_head.register_forward_hook(lambda *arguments: arguments[2].tanh())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(copy.deepcopy(model), config(tmp_path), annotated(8), ref_model=tiny("gpt2"))
    args = config(tmp_path, inplace=False)
    trained(model, args, annotated(8), ref_model=tiny("gpt2"))
    assert any(not torch.equal(x, start[name]) for name, x in parameters(model).items())


# --- Counts ---------------------------------------------------------------------------------------


def test_the_count_is_of_rows(tmp_path):
    trainer = tnt.hf.TNTTrainer(tiny("gpt2"), config(tmp_path))
    labels = torch.tensor([[5, 6, 7, -100], [5, -100, -100, 8]])
    weights = torch.tensor([[1.0, 0.0, -1.0, 1.0], [1.0, 1.0, 1.0, 0.5]])
    batch = {"labels": labels, "weights": weights}
    assert trainer._get_num_items_in_batch([batch, batch], "cpu") == 4  # not the first tokens
    encoder_decoder = tnt.hf.TNTTrainer(tiny("t5"), config(tmp_path))
    assert encoder_decoder._get_num_items_in_batch([batch], "cpu") == 4


def test_a_batch_without_rows(tmp_path):
    model = tiny("gpt2")
    start = parameters(model)
    examples = [{"input_ids": [5, 6, 7], "weights": [0, 0, 0]}] * 4
    trainer = trained(model, config(tmp_path), examples, eval_dataset=examples)
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all(torch.equal(x, start[name]) for name, x in parameters(model).items())
    assert trainer.evaluate()["eval_loss"] == 0.0


# --- Logs and evaluation --------------------------------------------------------------------------


def test_logs(tmp_path):
    model, original, examples = tiny("gpt2"), tiny("gpt2", seed=1), annotated(8)
    args = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    logs = trained(
        copy.deepcopy(model), args, examples, ref_model=copy.deepcopy(original)
    ).state.log_history[0]
    batch = tnt.hf.TNTDataCollator()(examples)
    labels, weights = batch.pop("labels").roll(-1, 1), batch.pop("weights").roll(-1, 1)
    weights[:, -1] = 0
    with torch.no_grad():
        logits, ref_logits = model.eval()(**batch).logits, original.eval()(**batch).logits
    stats = tnt.tnt_loss(logits, ref_logits, labels, weights, reduction="none", return_stats=True)[
        1
    ]
    negative, positive = weights < 0, weights > 0
    assert logs["negative_mass"] == pytest.approx(
        stats.negative_mass[negative].mean().item(), rel=1e-4
    )
    assert logs["ref_negative_mass"] == pytest.approx(
        stats.ref_negative_mass[negative].mean().item(), rel=1e-4
    )
    assert logs["positive_kl"] == pytest.approx(stats.kl[positive].mean().item(), rel=1e-4)
    assert logs["negative_share"] == pytest.approx(
        negative.sum().item() / (weights != 0).sum().item()
    )
    logs = trained(model, config(tmp_path, method="ul+ll"), examples).state.log_history[0]
    assert "negative_mass" in logs
    assert not {"positive_kl", "ref_negative_mass"} & set(logs)


class ReadsOfTheDevice(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["tnff", "tnfll", "ul+ll"])
def test_rows_are_counted_before_they_are_on_a_device(method, tmp_path, monkeypatch):
    """Every loss is told, so that it need not ask; and the step's count is the sum. "tnfll" asks for two numbers."""
    told, counts, normalizers = [], [], []

    def recorded(*arguments, **keywords):
        told.append(keywords.get("max_active_rows"))
        counts.append(int(((arguments[4] != -100) & (arguments[5] != 0)).sum()))
        normalizers.append(float(keywords["normalizer"]))
        return tnt.linear_tnt_loss(*arguments, **keywords)

    monkeypatch.setattr("tnt_kernels.hf.batch_loss.linear_tnt_loss", recorded)
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "method": method}
    trained(tiny("gpt2"), config(tmp_path, **options), annotated(9))
    assert len({*counts}) > 1
    assert told == (counts if method != "tnfll" else [None] * 3)
    assert normalizers == [sum(counts)] * 3


def test_batches_that_are_cut_into_pieces_hold_tensors_alone(tmp_path, monkeypatch):
    """accelerate's dispatching loader cannot take anything else."""
    args = config(tmp_path)
    trainer = tnt.hf.TNTTrainer(tiny("gpt2"), args, train_dataset=annotated(8))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["active_rows"] == int((batch["weights"] != 0).sum())
    assert isinstance(trainer.data_collator, tnt.hf.TNTDataCollator)
    trainer.args.accelerator_config.dispatch_batches = True
    monkeypatch.setattr(type(args), "world_size", 2, raising=False)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "active_rows" not in batch


def test_a_step_does_not_wait_for_the_device(tmp_path):
    """Beyond what the two models and the loss itself read (on a CPU, labels are checked)."""
    trainer = tnt.hf.TNTTrainer(tiny("llama"), config(tmp_path, fused_linear=False))
    batch = tnt.hf.TNTDataCollator()(annotated(8))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.compute_loss(trainer.model, batch)  # the first one looks at the model
    with ReadsOfTheDevice() as needed:
        with torch.no_grad():
            ref_logits = trainer.ref_model(**inputs).logits
        logits = trainer.model(**inputs).logits
        tnt.tnt_loss(logits, ref_logits, batch["labels"], batch["weights"]).backward()
    with ReadsOfTheDevice() as reads:
        count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
    assert reads.count <= needed.count


def test_nan_is_not_hidden(tmp_path):
    model = tiny("gpt2")
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = math.nan
    logs = trained(
        model, config(tmp_path, fused_linear=False), annotated(8), ref_model=tiny("gpt2")
    ).state.log_history
    assert math.isnan(logs[0]["loss"])


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_evaluation(kind, tmp_path):
    model, original = tiny(kind), tiny(kind, seed=1)
    examples, start = annotated(7, encoder_decoder=kind == "t5"), parameters(model)
    loss, _ = by_hand(copy.deepcopy(model), original, examples)
    args = config(tmp_path, per_device_eval_batch_size=3)
    trainer = tnt.hf.TNTTrainer(
        model, args, eval_dataset=examples, ref_model=copy.deepcopy(original)
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)  # over rows, whatever the batches
    assert {
        "eval_negative_mass",
        "eval_ref_negative_mass",
        "eval_positive_kl",
        "eval_negative_share",
    } <= {*metrics}
    assert all(torch.equal(x, start[name]) for name, x in parameters(model).items())
    seen = []
    trainer.compute_metrics = lambda p: seen.append(p) or {"n": 1.0}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    predictions = seen[0].predictions
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    batch = tnt.hf.TNTDataCollator(model=model)(examples[:3])
    inputs = {k: x for k, x in batch.items() if k not in ("labels", "weights")}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    torch.testing.assert_close(
        torch.tensor(predictions[:3, : logits.size(1)]), logits, rtol=1e-4, atol=1e-4
    )


# --- Saving ---------------------------------------------------------------------------------------


def test_save_resume_and_load(tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4,
            "optim": "adamw_torch", "learning_rate": 1e-2}  # fmt: skip
    examples = annotated(16)
    whole = trained(tiny("gpt2"), config(tmp_path / "a", **args), examples)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    resumed = tnt.hf.TNTTrainer(
        tiny("gpt2"), config(tmp_path / "b", **args), train_dataset=examples
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(parameters(whole.model), parameters(resumed.model), parameters(tiny("gpt2")), 1e-5)

    rebuilt = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    wrong = tnt.hf.TNTTrainer(rebuilt, config(tmp_path / "c", **args), train_dataset=examples)
    with pytest.raises(ValueError, match="had another reference than this trainer has"):
        wrong.train(resume_from_checkpoint=str(checkpoint))
    right = tnt.hf.TNTTrainer(
        rebuilt, config(tmp_path / "c", **args), train_dataset=examples, ref_model=tiny("gpt2")
    )
    right.train(resume_from_checkpoint=str(checkpoint))
    assert_same(parameters(whole.model), parameters(right.model), parameters(tiny("gpt2")), 1e-5)

    whole.save_model(str(tmp_path / "done"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "done")
    assert all(
        torch.equal(x, parameters(loaded)[name]) for name, x in parameters(whole.model).items()
    )
    assert "tnt" not in json.dumps(loaded.config.to_dict())


def test_an_update_as_its_own_reference_is_said(tmp_path, said):
    trained(tiny("gpt2"), config(tmp_path), annotated(8)).save_model(str(tmp_path / "done"))
    rebuilt = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "done")
    tnt.hf.TNTTrainer(rebuilt, config(tmp_path))
    assert any("becomes its own reference" in message for message in said())


# --- Errors ---------------------------------------------------------------------------------------


def test_bad_arguments(tmp_path):
    model = tiny("gpt2")
    with pytest.raises(TypeError, match="args: TrainingArguments, expected a TNTConfig"):
        tnt.hf.TNTTrainer(model, transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="ref_model: is model itself"):
        tnt.hf.TNTTrainer(model, config(tmp_path), ref_model=model)
    with pytest.raises(ValueError, match="one of model and ref_model is an encoder-decoder"):
        tnt.hf.TNTTrainer(model, config(tmp_path), ref_model=tiny("t5"))
    with pytest.raises(ValueError, match="compute_loss_func: given"):
        tnt.hf.TNTTrainer(model, config(tmp_path), compute_loss_func=print)
    with pytest.raises(
        ValueError, match=r"vocabularies of 100 and 100, expected at least the \d+ tokens"
    ):
        tnt.hf.TNTTrainer(model, config(tmp_path), processing_class=tokenizer())
    for options, message in (
        ({"method": "tnxx"}, "method is 'tnxx'"),
        ({"smoothing": "no"}, "smoothing is 'no'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **options)


def test_a_reference_with_other_special_tokens_is_said(tmp_path, said):
    tnt.hf.TNTTrainer(tiny("gpt2"), config(tmp_path), ref_model=tiny("gpt2", eos_token_id=9))
    assert any("eos_token_id is 9, the model's 2" in message for message in said())


def test_batches_without_annotations(tmp_path):
    trainer = tnt.hf.TNTTrainer(tiny("gpt2"), config(tmp_path))
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"no labels among its columns \(input_ids, weights\)"):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "weights": ids})
    with pytest.raises(
        ValueError, match=r"neither weights nor negative_ids among its columns \(labels, input_ids"
    ):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})
    with pytest.raises(ValueError, match=r"weights: shape \(1, 2\), expected \(1, 3\)"):
        trainer.compute_loss(
            trainer.model, {"input_ids": ids, "labels": ids, "weights": ids[:, :2]}
        )


def test_columns_of_texts_are_kept(tmp_path):
    words = tokenizer()
    examples = [
        {"prompt": "the", "completion": " cat", "negative_spans": [(1, 4)], "source": "x"}
    ] * 2
    model = tiny("gpt2", vocab_size=len(words))
    trainer = tnt.hf.TNTTrainer(
        model, config(tmp_path), train_dataset=examples, processing_class=words
    )
    trainer.train()
    assert trainer.state.log_history[0]["negative_share"] == 0.5


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_a_dataset_of_the_datasets_library(fused, tmp_path):
    """Columns of others are dropped, ours are kept; its lists are what tensors were."""
    datasets = pytest.importorskip("datasets")
    examples = annotated(8, negative_ids=True)
    rows = [{k: x.tolist() for k, x in example.items()} for example in examples]
    table = datasets.Dataset.from_list([{**row, "source": "x"} for row in rows])
    start, updates = parameters(tiny("gpt2")), []
    for data in (examples, table, table.with_format("torch")):
        args = config(tmp_path, fused_linear=fused)
        trainer = trained(tiny("gpt2"), args, data, eval_dataset=data, ref_model=tiny("gpt2", 1))
        updates.append(parameters(trainer.model))
        assert trainer.evaluate()["eval_loss"] > 0
    assert args.remove_unused_columns
    for update in updates[1:]:
        assert_same(updates[0], update, start, 1e-6)


def test_texts_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    words = tokenizer()
    texts = {"prompt": ["the", "a"], "completion": [" cat sat", " dog"], "source": ["x", "y"]}
    table = datasets.Dataset.from_dict({**texts, "negative_spans": [[[1, 4]], []]})
    trainer = trained(
        tiny("gpt2", vocab_size=len(words)), config(tmp_path), table, processing_class=words
    )
    assert 0 < trainer.state.log_history[0]["negative_share"] < 0.5


# --- A Trainer of one's own -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_compute_loss_func(kind, tmp_path):
    model, original = tiny(kind).double(), tiny(kind, seed=1).double()
    examples, start = annotated(8, encoder_decoder=kind == "t5"), parameters(model)
    if kind == "t5":
        disable_dropout(model)
    else:
        model.config.resid_pdrop = 0
        disable_dropout(model)
    _, expected = by_hand(copy.deepcopy(model), original, examples, method="tnrr")
    ours = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4).to_dict()
    known = transformers.TrainingArguments.__dataclass_fields__
    args = transformers.TrainingArguments(
        **{k: v for k, v in ours.items() if k in known and v is not None}
    )
    args.remove_unused_columns = False
    function = tnt.hf.compute_loss_func(model, original, method="tnrr")
    trainer = transformers.Trainer(
        model, args, tnt.hf.TNTDataCollator(model=model), examples, compute_loss_func=function
    )
    trainer.train()
    assert_same(expected, parameters(trainer.model), start, 1e-6)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        function(None, torch.ones(1, 2))
    function.remove()


# --- What it does to models -----------------------------------------------------------------------


def said_by(model, n, seed):
    """Examples of a model's own samples, with all unwanted tokens at every position."""
    torch.manual_seed(seed)
    prompts = torch.randint(3, VOCAB, (n, 4))
    options = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "pad_token_id": 0,
    }
    ids = model.eval().generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    encoder_decoder = model.config.is_encoder_decoder
    labels = ids[:, 1:] if encoder_decoder else ids
    weights = torch.ones(labels.shape)
    if not encoder_decoder:
        weights[:, :4] = 0
    sources = prompts if encoder_decoder else ids
    every = UNWANTED.expand(labels.size(1), -1)
    examples = [
        {"input_ids": i, "labels": t, "weights": w, "negative_ids": every}
        for i, t, w in zip(sources, labels, weights, strict=True)
    ]
    rate = torch.isin(labels[weights > 0], UNWANTED).float().mean().item()
    return examples, rate


@pytest.mark.parametrize("kind", KINDS)
def test_training_approaches_the_exact_update(kind, tmp_path):
    original = tiny(kind)
    examples, before = said_by(original, 128, 0)
    held_out, _ = said_by(original, 64, 1)
    ends = {}
    for method in ("tnff", "ul+ll"):
        args = config(
            tmp_path, method=method, max_steps=60, per_device_train_batch_size=16, optim="adamw_torch",
            learning_rate=3e-3, lr_scheduler_type="linear", logging_steps=60,
        )  # fmt: skip
        model = trained(copy.deepcopy(original), args, examples).model
        judge = tnt.hf.TNTTrainer(
            model, config(tmp_path), eval_dataset=held_out, ref_model=copy.deepcopy(original)
        )
        metrics = judge.evaluate()
        ends[method] = metrics["eval_loss"]  # KL to the exact token-level update
        if method == "tnff":
            start = -math.log1p(-metrics["eval_ref_negative_mass"])
            assert metrics["eval_negative_mass"] < 0.5 * metrics["eval_ref_negative_mass"]
            assert metrics["eval_loss"] < start
            assert said_by(model, 128, 2)[1] < 0.6 * before
    assert ends["tnff"] < 0.8 * ends["ul+ll"]
