"""Adapters: which model is the original, whatever trains, and what is said of it."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_tiny import annotated, assert_same, config, parameters, tiny, tokenizer, trained

import tnt_kernels as tnt
from tnt_kernels._linear.matmul import Head
from tnt_kernels.hf.dropout import disable_dropout
from tnt_kernels.hf.original import fingerprint, original_of, take_reference

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def lora(**options):
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**{**defaults, **options})


def adapted(seed=0, attention_bias=False, **options):
    """A model with an adapter that has been trained already, unless ``init_lora_weights=True``."""
    model = tiny("llama", attention_bias=attention_bias).double()
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, lora(**options), autocast_adapter_dtype=False)
    return model.double()


def merged(model):
    return copy.deepcopy(model).merge_and_unload().requires_grad_(True)


def log_of(model, tmp_path, examples=None, **options):
    keywords = {name: options.pop(name) for name in ("ref_model",) if name in options}
    trainer = trained(model, config(tmp_path, **options), examples or annotated(8), **keywords)
    return trainer.state.log_history[0]


# --- An original with adapters ---------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_a_reference_keeps_its_adapter(fused, tmp_path):
    """As given it says what it says merged; a model that starts from it merged is at its original."""
    original = adapted(seed=1)
    start, logs = parameters(tiny("llama").double()), []
    for ref_model in (copy.deepcopy(original), merged(original)):
        args = config(tmp_path, fused_linear=fused)
        trainer = trained(tiny("llama").double(), args, annotated(8), ref_model=ref_model)
        logs.append((trainer.state.log_history[0]["loss"], parameters(trainer.model)))
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-9)
    assert_same(logs[0][1], logs[1][1], start, 1e-6)
    log = log_of(merged(original), tmp_path, fused_linear=fused, ref_model=original)
    assert log["positive_kl"] < 1e-12


def test_a_reference_keeps_its_adapter_in_a_loss_function():
    model, original = tiny("llama").double(), adapted(seed=1)
    batch = tnt.hf.TNTDataCollator(model=model)(annotated(8))
    losses = []
    for ref_model in (copy.deepcopy(original), merged(original)):
        function = tnt.hf.compute_loss_func(model, ref_model)
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        losses.append(function(model(**inputs), batch["labels"]).item())
        function.remove()
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    base = tnt.hf.compute_loss_func(model, tiny("llama").double())
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    assert base(model(**inputs), batch["labels"]).item() != pytest.approx(losses[0], rel=1e-3)


def test_hidden_states_are_precomputed_with_the_adapter(tmp_path):
    original, examples = adapted(seed=1), annotated(8)
    collate = tnt.hf.TNTDataCollator()
    with_it, alone = (
        tnt.hf.precompute_reference(model, examples, collate)
        for model in (original, merged(original))
    )
    for one, other in zip(with_it, alone, strict=True):
        torch.testing.assert_close(one["ref_hidden_states"], other["ref_hidden_states"])
    # A model's own adapters: hidden states of another original than the trainer's are noticed.
    model = adapted(seed=1)
    args = config(tmp_path, precomputed_reference=True)
    with pytest.raises(ValueError, match=r"ref_hidden_states: .* apart.* without its adapters"):
        trained(model, args, with_it)
    with model.disable_adapter():
        base = tnt.hf.precompute_reference(model, examples, collate)
    expected = log_of(adapted(seed=1), tmp_path)
    assert log_of(model, tmp_path, base, precomputed_reference=True)["loss"] == pytest.approx(
        expected["loss"], rel=1e-6
    )
    options = {"precomputed_reference": True, "adapter_reference": "start"}
    assert log_of(adapted(seed=1), tmp_path, with_it, **options)["positive_kl"] < 1e-12


# --- A model with adapters --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_an_adapter_that_was_trained_already_is_said(fused, tmp_path, said):
    log = log_of(adapted(), tmp_path, fused_linear=fused)
    assert log["positive_kl"] > 0.01
    assert sum("adapter_reference='start'" in message for message in said()) == 1


def test_a_fresh_adapter_is_not_said(tmp_path, said):
    assert log_of(adapted(init_lora_weights=True), tmp_path)["positive_kl"] < 1e-12
    assert not any("adapter" in message for message in said())


@pytest.mark.parametrize("reference", ["base", "start"])
def test_a_head_without_adapters_is_multiplied_with_differences(reference, tmp_path, monkeypatch):
    seen, differences = [], Head.differences
    monkeypatch.setattr(Head, "differences", lambda *a: seen.append(True) or differences(*a))
    log_of(adapted(), tmp_path, fused_linear=True, adapter_reference=reference)
    assert seen


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_the_start_of_an_adapter_can_be_the_reference(fused, tmp_path, said):
    """Over several steps, with what else trains: as with a copy of the model as the original."""
    options = {"bias": "all", "modules_to_save": ["norm"], "attention_bias": True}
    model, start = adapted(**options), None
    start = parameters(model)
    args = {"fused_linear": fused, "max_steps": 3, "adapter_reference": "start"}
    expected = trained(
        copy.deepcopy(model),
        config(tmp_path, **args),
        annotated(24),
        ref_model=copy.deepcopy(model),
    )
    trainer = trained(model, config(tmp_path, **args), annotated(24))
    assert trainer.ref_model is None
    assert trainer.state.log_history[0]["positive_kl"] < 1e-12
    assert trainer.state.log_history[2]["positive_kl"] > 1e-6
    assert_same(parameters(expected.model), parameters(model), start, 1e-6)
    assert not any("adapter" in message for message in said())


def test_a_loss_function_says_it_too(said):
    model = adapted()
    batch = tnt.hf.TNTDataCollator(model=model)(annotated(8))
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    for _ in range(2):
        function = tnt.hf.compute_loss_func(model)
        function(model(**inputs), batch["labels"])
        function.remove()
    assert sum("adapter_reference='start'" in message for message in said()) == 2
    function = tnt.hf.compute_loss_func(model, adapter_reference="start", method="tnrr")
    loss = function(model(**inputs), batch["labels"])
    function.remove()
    expected = tnt.hf.compute_loss_func(model, copy.deepcopy(model), method="tnrr")
    assert loss.item() == pytest.approx(expected(model(**inputs), batch["labels"]).item(), rel=1e-9)
    with pytest.raises(ValueError, match="adapter_reference is 'first'"):
        tnt.hf.compute_loss_func(model, adapter_reference="first")


def unfrozen(model):
    for x in model.base_model.model.model.layers[0].mlp.parameters():
        x.requires_grad_(True)
    model.base_model.model.lm_head.weight.requires_grad_(True)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("what", ["all", "lora_only", "layers"])
def test_the_reference_stays_where_its_parameters_train(what, fused, tmp_path):
    """Biases and layers of the base, its head too: over steps, the original is the base as it was."""
    sizes = {"attention_bias": True, "mlp_bias": True}
    base = tiny("llama", **sizes).double()
    options = {} if what == "layers" else {"bias": what}
    model = peft.get_peft_model(copy.deepcopy(base), lora(init_lora_weights=True, **options))
    if what == "layers":
        unfrozen(model)
    start, args = parameters(model), {"fused_linear": fused, "max_steps": 4, "learning_rate": 1.0}
    expected = trained(
        copy.deepcopy(model), config(tmp_path, **args), annotated(32), ref_model=copy.deepcopy(base)
    )
    trainer = trained(model, config(tmp_path, **args), annotated(32))
    assert (trainer._first_batch.head_math is not None) == fused
    assert_same(parameters(expected.model), parameters(trainer.model), start, 1e-6)
    moved = [n for n, x in model.named_parameters() if "lora" not in n and (x != start[n]).any()]
    assert moved  # of the base
    ids = torch.arange(3, 13)[None]
    with trainer._reference.original.running(model) as module:
        torch.testing.assert_close(module(ids).logits, base.eval()(ids).logits)
    assert not torch.allclose(model.eval()(ids).logits, base(ids).logits)


def test_what_does_not_train_still_does_not(tmp_path):
    """PEFT's ways back from a disabled adapter make all of it trainable."""
    model = adapted(init_lora_weights=True)
    for name, x in model.named_parameters():
        if "lora_A" in name:
            x.requires_grad_(False)
    flags = {name: x.requires_grad for name, x in model.named_parameters()}
    trainer = trained(model, config(tmp_path), annotated(8))
    assert {name: x.requires_grad for name, x in trainer.model.named_parameters()} == flags
    assert all(x.grad is None for name, x in model.named_parameters() if "lora_A" in name)


def test_adapters_of_transformers_itself(tmp_path):
    """``model.add_adapter``: their original is the base, too, without a copy of it."""
    model = tiny("llama").double()
    torch.manual_seed(0)
    model.add_adapter(lora(modules_to_save=["lm_head"]))
    model = model.double()
    start = parameters(model)
    base = tiny("llama").double()
    args = {"max_steps": 3}
    expected = trained(
        copy.deepcopy(model), config(tmp_path, **args), annotated(24), ref_model=base
    )
    trainer = trained(model, config(tmp_path, **args), annotated(24))
    assert trainer.ref_model is None
    assert_same(parameters(expected.model), parameters(model), start, 1e-6)
    moved = {n for n, x in model.named_parameters() if (x != start[n]).any()}
    assert any("modules_to_save" in name for name in moved)  # they were enabled again


def test_a_model_made_anew(tmp_path):
    """``model_init``: the original is the base of the model that trains."""
    trainer = tnt.hf.TNTTrainer(
        args=config(tmp_path, max_steps=2),
        train_dataset=annotated(16),
        model_init=lambda: adapted(bias="all", attention_bias=True),
    )
    trainer.train()
    kept = {id(x) for x, _ in trainer._reference.original.kept}
    assert kept
    assert kept <= {id(x) for x in trainer.model.parameters()}


# --- Adapters that swap the forward -------------------------------------------------------------------


def prompted(kind, **options):
    torch.manual_seed(0)
    kinds = {
        "prompt": peft.PromptTuningConfig,
        "prefix": peft.PrefixTuningConfig,
        "p": peft.PromptEncoderConfig,
    }
    more = {"encoder_hidden_size": 8} if kind == "p" else {}
    return kinds[kind](task_type="CAUSAL_LM", num_virtual_tokens=3, **more, **options)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p"])
def test_the_reference_has_no_virtual_tokens(kind, fused, precision, tmp_path):
    """Their base is the original in mixed precision too, where accelerate stands before the forward."""
    model = peft.get_peft_model(tiny("llama"), prompted(kind))
    for x in model.prompt_encoder.parameters():
        torch.nn.init.normal_(x)
    start, updates = parameters(model), []
    for ref_model in (tiny("llama"), None):
        args = config(tmp_path, fused_linear=fused, **precision)
        trainer = trained(copy.deepcopy(model), args, annotated(8), ref_model=ref_model)
        assert (trainer._first_batch.head_math is not None) == fused
        assert trainer.state.log_history[0]["positive_kl"] > 1e-3
        updates.append(parameters(trainer.model))
    assert_same(updates[0], updates[1], start, 0.05 if precision else 1e-4)


def test_virtual_tokens_and_positions(tmp_path):
    """PEFT ignores the positions of such models: they are not made for them, and refused where they are given."""
    words = tokenizer(padding_side="left")
    model = peft.get_peft_model(tiny("gpt2", vocab_size=len(words)), prompted("prompt"))
    trainer = tnt.hf.TNTTrainer(model, config(tmp_path), processing_class=words)
    batch = trainer.data_collator(annotated(4))
    assert "position_ids" not in batch
    assert batch["attention_mask"][:, 0].all()  # padded on the right
    with pytest.raises(ValueError, match="holds position_ids, which PEFT ignores"):
        trainer.compute_loss(model, {**batch, "position_ids": batch["input_ids"].cumsum(1)})
    packed = {"input_ids": [5, 6, 7, 8], "weights": [1, 1, 1, 1], "position_ids": [0, 1, 0, 1]}
    with pytest.raises(ValueError, match="position_ids: begin again at 0 within an example"):
        trainer.data_collator([packed])


def test_trained_parameters_of_a_reference_are_not_sharded(tmp_path):
    model = adapted(bias="all", attention_bias=True)
    with pytest.raises(ValueError, match="parameters that its reference reads train, which FSDP"):
        take_reference(model, None, config(tmp_path), accelerator=None, sharded=True)


def test_fingerprints(tmp_path):
    """Of an original with adapters they are of these, too; of a base they are not."""
    one, other = adapted(seed=1), adapted(seed=2)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one, True) == fingerprint(other, True)
    prints = {
        start: tnt.hf.TNTTrainer(
            model, config(tmp_path, adapter_reference=start)
        )._reference.fingerprint
        for start, model in (("base", one), ("start", other))
    }
    assert prints["base"] == fingerprint(other, True)
    assert prints["start"] == fingerprint(other)
    with pytest.raises(ValueError, match="adapter_reference is 'end'"):
        config(tmp_path, adapter_reference="end")


@pytest.mark.parametrize("start", ["base", "start"])
def test_rounds_of_refinement(start, tmp_path, said):
    """The first round's reference stays, or each round's is where it starts; nothing is warned of that is meant."""
    words = tokenizer()
    model = tiny("llama", vocab_size=len(words))
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora(init_lora_weights=start == "base"))
    model.generation_config.eos_token_id = words.eos_token_id

    def annotate(examples):
        return [{**x, "weights": [-1.0] * len(x["completion"])} for x in examples]

    options = {"rounds": 2, "generation": {"max_new_tokens": 4}}
    kept = []
    for reference in ("first", "previous"):
        args = config(tmp_path / reference, adapter_reference=start, method="tnfll", max_steps=2)
        own, seen = copy.deepcopy(model), []

        def recorded(*arguments, seen=seen):
            seen.append(original_of(*arguments))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tnt_kernels.hf.original.original_of", recorded)
            tnt.hf.refine(
                own, words, ["the", "a cat"], annotate, args, reference=reference, **options
            )
        kept.append(seen)
    first, previous = kept
    assert all(x.without_adapters for x in first) == (start == "base")
    assert (first[0].model is None) == (start == "base")
    assert all(x.model is None and not x.without_adapters for x in previous)
    values = [torch.cat([value.flatten() for _, value in x.kept]) for x in previous]
    assert not torch.equal(*values)
    assert not any("its adapters change it already" in message for message in said())


KINDS = {
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "adaption": lambda: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[5, 6, 7, 10, 20], target_modules=["embed_tokens"]
    ),
    "tokens and lora": lambda: lora(trainable_token_indices=[5, 6, 7, 10, 20]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_the_reference_of_any_kind_of_adapter(kind, tmp_path):
    """Of one that changes the model already, over steps that change it further."""
    base = tiny("llama")
    model = peft.get_peft_model(copy.deepcopy(base), KINDS[kind]())
    torch.manual_seed(0)
    for x in model.parameters():
        if x.requires_grad:
            x.data.add_(0.3 * torch.randn_like(x))
    losses = []
    for ref_model in (base, None):
        args = config(tmp_path, max_steps=3)
        trainer = trained(copy.deepcopy(model), args, annotated(24), ref_model=ref_model)
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# --- A base that would not be the original -------------------------------------------------------


@pytest.mark.parametrize("start", ["base", "start"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_what_begins_to_train_later_is_noticed(fused, start, tmp_path):
    """As gradual unfreezing does, after the reference was taken."""
    args = config(tmp_path, fused_linear=fused, adapter_reference=start)
    trainer = tnt.hf.TNTTrainer(adapted(), args, train_dataset=annotated(8))
    unfrozen(trainer.model)
    with pytest.raises(ValueError, match=r"model: \d+ parameters that its reference reads train"):
        trainer.train()
    model = adapted()
    function = tnt.hf.compute_loss_func(model, adapter_reference=start)
    unfrozen(model)
    batch = tnt.hf.TNTDataCollator(model=model)(annotated(8))
    outputs = model(**{name: x for name, x in batch.items() if name != "labels"})
    with pytest.raises(ValueError, match="that its reference reads train"):
        function(outputs, batch["labels"])


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_change_their_base(kind, tmp_path):
    """Without them it is not the original; with them as they start it is."""
    base = tiny("llama")
    model = peft.get_peft_model(copy.deepcopy(base), lora(init_lora_weights=kind))
    with pytest.raises(
        ValueError, match=f"init_lora_weights='{kind}' of the adapter 'default' takes"
    ):
        tnt.hf.TNTTrainer(model, config(tmp_path))
    with pytest.raises(ValueError, match="adapter_reference='start', or a ref_model"):
        tnt.hf.compute_loss_func(model)
    examples, losses = annotated(16), []
    for ref_model, start in ((base, "base"), (None, "start")):
        args = config(tmp_path, adapter_reference=start, max_steps=2)
        trainer = trained(copy.deepcopy(model), args, examples, ref_model=ref_model)
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_adapters_that_are_merged_are_refused(tmp_path):
    model = adapted()
    model.merge_adapter()
    for start in ("base", "start"):
        with pytest.raises(ValueError, match="model: its adapters are merged into the base"):
            tnt.hf.TNTTrainer(model, config(tmp_path, adapter_reference=start))


def test_a_reference_that_shares_parameters_is_refused(tmp_path):
    """It would be frozen with the model, or train with it."""
    model, other = tiny("llama"), tiny("llama", seed=1)
    other.model.embed_tokens = model.model.embed_tokens
    for ref_model in (other, model):
        with pytest.raises(
            ValueError, match=r"ref_model: \d+ of its parameters are the model's own"
        ):
            tnt.hf.compute_loss_func(model, ref_model)
    with pytest.raises(ValueError, match="ref_model: 1 of its parameters are the model's own"):
        tnt.hf.TNTTrainer(model, config(tmp_path), ref_model=other)
    assert all(x.requires_grad for x in model.parameters())
    model = adapted(init_lora_weights=True)  # the base of adapters does not train and may be shared
    expected = log_of(copy.deepcopy(model), tmp_path)
    found = log_of(model, tmp_path, ref_model=adapted(init_lora_weights=True).get_base_model())
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)


def test_hidden_states_of_a_reference_that_is_given(tmp_path):
    """They are not the base's, and the base is not asked for them."""
    model, original, examples = (
        adapted(init_lora_weights=True),
        tiny("llama", seed=1).double(),
        annotated(8),
    )
    expected = log_of(copy.deepcopy(model), tmp_path, ref_model=copy.deepcopy(original))
    more = tnt.hf.precompute_reference(original, examples, tnt.hf.TNTDataCollator())
    found = log_of(model, tmp_path, more, precomputed_reference=True, ref_model=original)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)


@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("start", ["base", "start"])
def test_runs_that_go_on(start, precomputed, tmp_path, said):
    """They have the same original, biases that train and precomputed hidden states too, and nothing is said."""
    examples, args = annotated(16), {
        "adapter_reference": start, "precomputed_reference": precomputed, "max_steps": 4, "learning_rate": 1.0,
        "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip

    def make():
        return adapted(bias="all", attention_bias=True, init_lora_weights=start == "base")

    if precomputed:
        model = make()
        with original_of(model, None, start).running(model):
            examples = tnt.hf.precompute_reference(model, examples, tnt.hf.TNTDataCollator())
    whole = trained(make(), config(tmp_path / "a", **args), examples)
    resumed = tnt.hf.TNTTrainer(make(), config(tmp_path / "b", **args), train_dataset=examples)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(parameters(whole.model), parameters(resumed.model), parameters(make()), 1e-6)
    assert not any("adapters change it" in message for message in said())


def test_adapters_that_are_loaded_frozen_are_said(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(tiny("llama").double(), tmp_path / "adapter")
    trainer = tnt.hf.TNTTrainer(frozen, config(tmp_path), train_dataset=annotated(8))
    with pytest.raises(
        ValueError, match=r"none of its parameters requires a gradient.*is_trainable=True"
    ):
        trainer.train()


def test_fresh_adapters_on_an_update_are_said(tmp_path, said):
    trained(tiny("llama"), config(tmp_path), annotated(8)).save_model(str(tmp_path / "done"))
    updated = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "done")
    tnt.hf.TNTTrainer(peft.get_peft_model(updated, lora()), config(tmp_path))
    assert any("becomes its own reference" in message for message in said())
    plain, wrapped = tiny("llama"), peft.get_peft_model(tiny("llama"), lora())
    assert fingerprint(plain) == fingerprint(wrapped, without_adapters=True)


def test_a_tied_head_that_is_saved_with_the_adapter(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = peft.get_peft_model(model, lora(init_lora_weights=True, **options))
    log = log_of(model, tmp_path)
    assert log["positive_kl"] < 1e-9


def test_a_loss_function_notices_dropout(said):
    model = tiny("gpt2", resid_pdrop=0.5).train()
    batch = tnt.hf.TNTDataCollator(model=model)(annotated(8))
    function = tnt.hf.compute_loss_func(model)
    for _ in range(2):
        outputs = model(**{name: x for name, x in batch.items() if name != "labels"})
        function(outputs, batch["labels"])
    assert sum("dropout is on in it" in message for message in said()) == 1
    disable_dropout(model)
    quiet = tnt.hf.compute_loss_func(model)
    function.remove()
    outputs = model(**{name: x for name, x in batch.items() if name != "labels"})
    quiet(outputs, batch["labels"])
    assert len(said()) == 1
