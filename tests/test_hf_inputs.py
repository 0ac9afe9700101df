"""What examples hold beside ids: masks, positions, images; padding on either side; texts packed into a row."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_tiny import VOCAB, annotated, assert_same, config, parameters, tiny, tokenizer, trained

import tnt_kernels as tnt
from tnt_kernels.hf.dropout import disable_dropout
from tnt_kernels.hf.rows import CountedRows

transformers = pytest.importorskip("transformers")


def loss_and_gradients(model, original, batch, tmp_path, **options):
    model = copy.deepcopy(model)
    trainer = tnt.hf.TNTTrainer(
        model, config(tmp_path, **options), ref_model=copy.deepcopy(original)
    )
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), {name: x.grad.clone() for name, x in model.named_parameters()}


def assert_same_step(one, other, rtol=1e-6):
    assert one[0] == pytest.approx(other[0], rel=rtol)
    nothing = {name: torch.zeros_like(x) for name, x in one[1].items()}
    assert_same(one[1], other[1], nothing, rtol)


def pair(kind, **options):
    return tiny(kind, **options).double(), tiny(kind, seed=1, **options).double()


def expected_step(models, examples, tmp_path):
    """Of the texts one by one, and so without padding: the mean over all rows."""
    collate = tnt.hf.TNTDataCollator(model=models[0])
    total, gradients, rows = 0.0, {}, 0
    for example in examples:
        batch = collate([example])
        count = int((batch["weights"] != 0).sum())
        if not count:
            continue
        loss, found = loss_and_gradients(*models, batch, tmp_path)
        rows += count
        total += count * loss
        gradients = {name: count * x + gradients.get(name, 0) for name, x in found.items()}
    return total / rows, {name: x / rows for name, x in gradients.items()}


def packed(examples):
    """All of them in one example, whose positions begin again."""
    joined = {name: torch.cat([x[name] for x in examples]) for name in examples[0]}
    positions = torch.cat([torch.arange(len(x["input_ids"])) for x in examples])
    return {**joined, "position_ids": positions}


def padded_by_hand(example, n, left=False):
    """As a tokenizer pads: a mask of 0, and labels, weights and ids that are not to be looked at."""
    more = {"input_ids": 7, "labels": 9, "weights": 1.0}
    found = {}
    for name, value in more.items():
        x = example[name]
        fill = x.new_full((n,), value)
        found[name] = torch.cat((fill, x) if left else (x, fill))
    mask = torch.ones(len(found["input_ids"]), dtype=torch.int64)
    mask[:n] = 0 if left else 1
    mask[len(mask) - n :] = mask[len(mask) - n :] if left else 0
    return {**found, "attention_mask": mask}


# --- Padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_that_examples_have_is_taken_off(kind, left, tmp_path):
    models, examples = pair(kind), annotated(6)
    expected = expected_step(models, examples, tmp_path)
    padded = [padded_by_hand(x, n, left) for n, x in enumerate(examples)]
    for fused in (True, False):
        batch = tnt.hf.TNTDataCollator(model=models[0])(padded)
        assert batch["input_ids"].size(1) == max(len(x["input_ids"]) for x in examples)
        found = loss_and_gradients(*models, batch, tmp_path, fused_linear=fused)
        assert_same_step(expected, found)


def test_sources_that_a_tokenizer_has_padded(tmp_path):
    """An encoder reads no padding; the decoder's tokens are its own."""
    models, examples = pair("t5"), annotated(6, encoder_decoder=True)
    expected = expected_step(models, examples, tmp_path)
    longest = max(len(x["input_ids"]) for x in examples)
    padded = []
    for example in examples:
        source = example["input_ids"]
        fill = torch.zeros(longest - len(source), dtype=torch.int64)
        mask = torch.cat((torch.ones_like(source), fill))
        padded.append({**example, "input_ids": torch.cat((source, fill)), "attention_mask": mask})
    batch = tnt.hf.TNTDataCollator(model=models[0])(padded)
    assert batch["attention_mask"].sum(1).tolist() == [len(x["input_ids"]) for x in examples]
    assert_same_step(expected, loss_and_gradients(*models, batch, tmp_path))


def test_a_mask_within_a_text_is_passed_on(tmp_path):
    models = pair("llama")
    example = {
        "input_ids": [5, 6, 7, 8, 9],
        "weights": [0, 1, 1, -1, 1],
        "attention_mask": [1, 1, 0, 1, 1],
    }
    batch = tnt.hf.TNTDataCollator(model=models[0])([example])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 1, 1]]
    full = tnt.hf.TNTDataCollator(model=models[0])([{**example, "attention_mask": [1] * 5}])
    masked, whole = (loss_and_gradients(*models, x, tmp_path)[0] for x in (batch, full))
    assert masked != pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_padding_on_the_left(kind, fused, tmp_path):
    models, examples = pair(kind), annotated(6)
    rtol = 1e-6
    if kind == "gemma2":  # its attention takes masks of float64 to float32, where they are infinite
        models, rtol = [model.float() for model in models], 1e-4
    collate = tnt.hf.TNTDataCollator(tokenizer(padding_side="left"), models[0])
    batch = collate(examples)
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"][:, 0].all()
    lengths = [len(x["input_ids"]) for x in examples]
    for row, n in enumerate(lengths):
        assert batch["position_ids"][row, -n:].tolist() == list(range(n))
        assert batch["labels"][row, -n] == -100
    found = loss_and_gradients(*models, batch, tmp_path, fused_linear=fused)
    assert_same_step(expected_step(models, examples, tmp_path), found, rtol)


def test_models_without_positions_are_padded_on_the_right():
    words = tokenizer(padding_side="left")
    for model in (None, tiny("t5")):
        examples = annotated(4, encoder_decoder=model is not None)
        batch = tnt.hf.TNTDataCollator(words, model)(examples)
        assert batch["attention_mask"][:, 0].all()
        assert "position_ids" not in batch
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1)
    )
    assert tnt.hf.TNTDataCollator(words, mamba)(annotated(4))["attention_mask"][:, 0].all()


def test_left_padding_to_a_multiple():
    words = tokenizer(padding_side="left")
    collate = tnt.hf.TNTDataCollator(words, tiny("gpt2"), pad_to_multiple_of=16)
    batch = collate([{"input_ids": [5, 6, 7], "weights": [0, 1, 1]}])
    assert batch["input_ids"].tolist() == [[0] * 13 + [5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0] * 14 + [1, 2]]


# --- Packed texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_texts_in_one_row(kind, fused, tmp_path):
    """As examples with positions, with lengths, mixed with others, and made by the collator."""
    models, examples = pair(kind), annotated(6, negative_ids=False)
    expected = expected_step(models, examples, tmp_path)
    words = tokenizer(padding_side="left")
    by_length = packed(examples)
    ends = torch.tensor([0, *(len(x["input_ids"]) for x in examples)]).cumsum(0)
    by_length = {**by_length, "cu_seq_lens_q": ends.tolist()}
    del by_length["position_ids"]
    batches = [
        tnt.hf.TNTDataCollator(model=models[0])([packed(examples)]),
        tnt.hf.TNTDataCollator(model=models[0])([by_length]),
        tnt.hf.TNTDataCollator(model=models[0])([packed(examples[:3]), packed(examples[3:5]), examples[5]]),
        tnt.hf.TNTDataCollator(words, models[0])([packed(examples[:4]), *examples[4:]]),
        tnt.hf.TNTDataCollator(model=models[0], padding_free=True)(examples),
        tnt.hf.TNTDataCollator(model=models[0], padding_free=True, pad_to_multiple_of=64)(
            [packed(examples[:2]), *examples[2:]]
        ),
    ]  # fmt: skip
    for batch in batches:
        assert "attention_mask" not in batch
        found = loss_and_gradients(*models, batch, tmp_path, fused_linear=fused)
        assert_same_step(expected, found)
    assert batches[4]["input_ids"].shape == (1, sum(len(x["input_ids"]) for x in examples))
    assert batches[5]["input_ids"].shape == (1, 64)


def test_a_step_without_padding(tmp_path):
    """The trainer's own: micro-batches, and evaluation, which pads."""
    model, original = pair("llama")
    start, examples, updates, losses = parameters(model), annotated(8), [], []
    for flat in (False, True):
        args = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        trainer = trained(
            copy.deepcopy(model), args, examples, ref_model=copy.deepcopy(original), eval_dataset=annotated(5, 2),
            data_collator=tnt.hf.TNTDataCollator(padding_free=flat),
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["input_ids"].size(0) == 1) == flat
        evaluated = next(iter(trainer.get_eval_dataloader()))
        assert evaluated["input_ids"].size(0) == 5
        updates.append(parameters(trainer.model))
        losses.append(trainer.evaluate()["eval_loss"])
    assert_same(*updates, start, 1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_phrases_do_not_go_on_in_the_next_text():
    words = tokenizer()
    phrases = tnt.negative_ids_from_phrases(words, ["cat sat"])
    model = tiny("gpt2", vocab_size=len(words))
    texts = [words("the cat")["input_ids"], words(" sat on the cat sat")["input_ids"]]
    examples = [{"input_ids": ids, "labels": ids} for ids in texts]
    single = tnt.hf.TNTDataCollator(words, model, phrases=phrases)

    def sets(batch):
        return [{*ids} - {-1} for ids in batch["negative_ids"][0].tolist()]

    expected = [ids for example in examples for ids in sets(single([example]))]
    flat = tnt.hf.TNTDataCollator(words, model, phrases=phrases, padding_free=True)
    assert sets(flat(examples)) == expected
    whole = {
        "input_ids": [*texts[0], *texts[1]],
        "position_ids": [*range(len(texts[0])), *range(len(texts[1]))],
    }
    assert sets(single([whole])) == expected
    assert any(expected)


def test_hidden_states_of_packed_texts(tmp_path):
    """Precomputed for padded batches, used in packed ones; texts alone and texts with padding of their own."""
    models, examples = pair("llama"), annotated(6)
    expected = expected_step(models, examples, tmp_path)
    examples = [packed(examples[:2]), padded_by_hand(examples[2], 3, left=True), *examples[3:]]
    words = tokenizer(padding_side="left")
    for collate in (
        tnt.hf.TNTDataCollator(words, models[0]),
        tnt.hf.TNTDataCollator(words, models[0], padding_free=True),
    ):
        more = tnt.hf.precompute_reference(models[1], examples, collate, batch_size=4)
        assert [len(x["ref_hidden_states"]) for x in more] == [
            int(torch.as_tensor(x.get("attention_mask", torch.ones_like(x["input_ids"]))).sum())
            for x in examples
        ]
        found = loss_and_gradients(*models, collate(more), tmp_path, precomputed_reference=True)
        assert_same_step(expected, found)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_texts_that_see_each_other_are_refused(fused, tmp_path):
    """A collator of one's own that gives a mask of ones beside such positions; transformers then takes one text."""
    trainer = tnt.hf.TNTTrainer(tiny("llama"), config(tmp_path, fused_linear=fused))
    batch = trainer.data_collator([packed(annotated(3))])
    trainer.compute_loss(trainer.model, batch)
    other = tnt.hf.TNTTrainer(tiny("llama"), config(tmp_path, fused_linear=fused))
    with pytest.raises(
        ValueError, match=r"position_ids: several texts in a row, but in LlamaForCausalLM they see"
    ):
        other.compute_loss(
            other.model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        )
    del batch["position_ids"]
    lengths = torch.tensor([0, 5, batch["input_ids"].size(1)], dtype=torch.int32)
    third = tnt.hf.TNTTrainer(tiny("llama"), config(tmp_path, fused_linear=fused))
    with pytest.raises(ValueError, match="they see each other"):  # no kernel here reads lengths
        third.compute_loss(
            third.model, {**batch, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
        )


def test_a_flattening_collator_of_transformers(tmp_path):
    """Its rows with weights added: no text's end predicts the next text's beginning, whatever the labels say."""
    models, examples = pair("llama"), annotated(4)
    flatten = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = dict(flatten([{k: x[k].tolist() for k in ("input_ids", "labels")} for x in examples]))
    batch["labels"] = batch["input_ids"].clone()
    batch["weights"] = torch.cat([x["weights"] for x in examples])[None]
    found = loss_and_gradients(*models, batch, tmp_path)
    assert_same_step(expected_step(models, examples, tmp_path), found)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_loss_function_separates_texts(kind, tmp_path):
    """The model in training makes no cache, with which transformers would take a row for one text."""
    models, examples = pair(kind, use_cache=True), annotated(6)
    disable_dropout(models[0])
    expected = expected_step(models, examples, tmp_path)
    batch = tnt.hf.TNTDataCollator(model=models[0], padding_free=True)(examples)
    models[0].config.use_cache = True
    function = tnt.hf.compute_loss_func(*models)
    outputs = models[0](**{name: x for name, x in batch.items() if name != "labels"})
    assert function(outputs, batch["labels"]).item() == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packing_in_mixed_precision(kind, tmp_path):
    """Its rounding is not taken for texts that see each other."""
    for seed in range(3):
        model = tiny(kind, seed=seed, num_hidden_layers=8)
        collate = tnt.hf.TNTDataCollator(model=model, padding_free=True)
        trainer = trained(model, config(tmp_path, bf16=True), annotated(8), data_collator=collate)
        assert trainer._first_batch.packing_seen
    native = tiny(kind, num_hidden_layers=8).bfloat16()
    assert trained(
        native, config(tmp_path), annotated(8), data_collator=collate
    )._first_batch.packing_seen


def test_packed_rows_are_looked_at_whatever_came_before(tmp_path):
    """An evaluation, or batches of single texts; a batch says so itself, so that no device is asked."""
    examples = annotated(6)
    trainer = tnt.hf.TNTTrainer(tiny("llama"), config(tmp_path), eval_dataset=examples)
    trainer.evaluate()
    batch = trainer.data_collator([packed(examples)])
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    trainer.model.train()
    with pytest.raises(ValueError, match="they see each other"):
        trainer.compute_loss(trainer.model, masked)
    trainer = tnt.hf.TNTTrainer(tiny("llama"), config(tmp_path))
    trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    with pytest.raises(ValueError, match="they see each other"):
        trainer.compute_loss(trainer.model, {**masked, "several_texts": True})
    counted = CountedRows(tnt.hf.TNTDataCollator(model=trainer.model), True)
    assert counted([packed(examples)])["several_texts"]
    assert not counted(examples)["several_texts"]
    left = tnt.hf.TNTDataCollator(tokenizer(padding_side="left"), trainer.model)
    assert not CountedRows(left, True)(examples)["several_texts"]
    assert CountedRows(left, True)([packed(examples[:2]), examples[2]])["several_texts"]


def test_a_model_made_anew_separates_texts(tmp_path):
    trainer = tnt.hf.TNTTrainer(
        args=config(tmp_path), train_dataset=annotated(8), model_init=lambda: tiny("llama"),
        data_collator=tnt.hf.TNTDataCollator(model=tiny("llama"), padding_free=True),
    )  # fmt: skip
    trainer.train()
    assert trainer._first_batch.packing_seen


# --- Images and others ----------------------------------------------------------------------------------


def test_images_are_passed_on():
    collate = tnt.hf.TNTDataCollator()
    example = {"input_ids": [5, 6], "weights": [0, 1]}
    image = torch.rand(3, 4, 4)
    batch = collate(
        [{**example, "pixel_values": image}, {**example, "pixel_values": image[None] * 2}]
    )
    torch.testing.assert_close(batch["pixel_values"], torch.stack((image, 2 * image)))
    assert "pixel_values" in collate([{**example, "pixel_values": image}, example])
    with pytest.raises(
        ValueError, match=r"pixel_values: shapes \(1, 3, 4, 4\), \(1, 3, 2, 2\), expected the same"
    ):
        collate([{**example, "pixel_values": image}, {**example, "pixel_values": image[:, :2, :2]}])


def test_token_types_are_padded():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1)
    )
    collate = tnt.hf.TNTDataCollator(model=model)
    examples = [
        {"input_ids": [5, 6, 7], "weights": [0, 1, 1], "token_type_ids": [1, 1, 2]},
        {"input_ids": [5, 6], "weights": [0, 1], "token_type_ids": [1, 2]},
    ]
    assert collate(examples)["token_type_ids"].tolist() == [[1, 1, 2], [1, 2, 0]]
    assert "token_type_ids" not in tnt.hf.TNTDataCollator(model=tiny("llama"))(examples)
    with pytest.raises(
        ValueError, match="token_type_ids: in 1 of 2 examples, expected in all or in none"
    ):
        collate([examples[0], {"input_ids": [5, 6], "weights": [0, 1]}])


def test_what_a_decoder_reads_can_be_given():
    model = tiny("t5")
    examples = [
        {"input_ids": [5, 6], "labels": [7, 8, 9], "weights": [1, 1, 1], "decoder_input_ids": [1, 7, 8],
         "decoder_attention_mask": [1, 1, 1]},
        {"input_ids": [5], "labels": [7, -100], "weights": [1, 1], "decoder_input_ids": [2, 7],
         "decoder_attention_mask": [1, 1]},
    ]  # fmt: skip
    batch = tnt.hf.TNTDataCollator(model=model)(examples)
    assert batch["decoder_input_ids"].tolist() == [[1, 7, 8], [2, 0, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


GIVEN = {"input_ids": [5, 6, 7], "weights": [0, 1, 1]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"attention_mask": [1, 1]},
            r"attention_mask: shape \(2,\), expected \(3,\), a number for each of input_ids",
        ),
        ({"attention_mask": [1, 2, 2]}, "attention_mask: holds 2, expected 0 and 1"),
        ({"attention_mask": torch.ones(3, 3)}, r"attention_mask: shape \(3, 3\), expected \(3,\)"),
        (
            {"position_ids": [0.0, 1.0, 2.0]},
            r"position_ids: shape \(3,\), torch.float32, expected \(T,\) integers",
        ),
        ({"position_ids": torch.zeros(3, 3).long()}, r"position_ids: shape \(3, 3\)"),
        (
            {"position_ids": [0, 0, 1], "attention_mask": [1, 0, 1]},
            "attention_mask: holds 0 between tokens",
        ),
        (
            {"cu_seq_lens_q": [0, 2]},
            r"cu_seq_lens_q: \[0, 2\] of 3 tokens, expected numbers that rise",
        ),
        ({"cu_seq_lens_q": [0, 2, 2, 3]}, "expected numbers that rise"),
        (
            {"inputs_embeds": torch.zeros(3, 4)},
            "inputs_embeds: a column of the examples, expected input_ids",
        ),
        ({"logits_to_keep": 1}, "logits_to_keep: a column of the examples"),
        ({"use_cache": True}, r"use_cache: shape \(\), expected \(3,\)"),
        (
            {"token_type_ids": "aab"},
            "token_type_ids: str, which the model's forward takes, but which is no tensor",
        ),
    ],
)
def test_what_cannot_be_passed_on_is_refused(more, message):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1)
    )
    with pytest.raises(ValueError, match=message):
        tnt.hf.TNTDataCollator(model=model)([{**GIVEN, **more}])


def test_what_else_is_refused():
    words = tokenizer()
    text = {"prompt": "the", "completion": " cat", "negative_spans": [], "attention_mask": [1, 1]}
    with pytest.raises(ValueError, match=r"attention_mask: shape \(2,\) beside a text"):
        tnt.hf.TNTDataCollator(words)([text])
    with pytest.raises(ValueError, match="padding_free: True for an encoder-decoder"):
        tnt.hf.TNTDataCollator(words, tiny("t5"), padding_free=True)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match="position_ids: needed for several texts in a row"):
        tnt.hf.TNTDataCollator(model=mamba, padding_free=True)([GIVEN, GIVEN])
    with pytest.raises(ValueError, match="position_ids: begin again at 0 within an example"):
        tnt.hf.TNTDataCollator(model=mamba)([{**GIVEN, "position_ids": [0, 1, 0]}])


# --- Bad examples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({**GIVEN, "weights": [0, 1, float("nan")]}, "weights: holds nan, expected finite numbers"),
        ({**GIVEN, "weights": [0, 1, float("inf")]}, "weights: holds inf"),
        ({**GIVEN, "input_ids": [5, -4, 7]}, "input_ids: holds -4, expected numbers from 0 on"),
        ({**GIVEN, "input_ids": [5.0, 6.0, 7.0]}, r"input_ids: shape \(3,\), torch.float32, expected \(T,\) integers"),
        ({**GIVEN, "input_ids": [[5, 6, 7]]}, r"input_ids: shape \(1, 3\)"),
        ({**GIVEN, "labels": [-100, -4, 7]}, "labels: holds -4, expected numbers from 0 on, or -100 where nothing"),
        ({**GIVEN, "negative_ids": [[], [-7], [3]]}, "negative_ids: holds -7, expected numbers from 0 on, or -1"),
        ({**GIVEN, "negative_ids": [[], [1.5], [3]]}, "negative_ids: torch.float32, expected integers"),
        ({**GIVEN, "negative_ids": torch.full((3, 2), -2)}, "negative_ids: holds -2"),
        ({"prompt": [5], "completion": [6], "weights": [float("nan")]}, "weights: holds nan"),
        ({"prompt": "the", "completion": " cat", "negative_spans": [(0.5, 2)]}, "expected pairs of integers"),
        ({"prompt": [5, -3], "completion": [6], "weights": [1]}, "prompt: holds the id -3"),
    ],
)  # fmt: skip
def test_bad_numbers(example, message):
    with pytest.raises(ValueError, match=message):
        tnt.hf.TNTDataCollator(tokenizer())([example])


def test_examples_of_which_nothing_is_left(tmp_path, said):
    words = tokenizer()
    collate = tnt.hf.TNTDataCollator(words, max_length=4)
    long = {"prompt": "the cat sat on the mat", "completion": " and", "negative_spans": [(1, 4)]}
    short = {"prompt": "the", "completion": " dog", "negative_spans": [(1, 4)]}
    for _ in range(2):
        batch = collate([long, short, {**GIVEN, "input_ids": [5] * 6, "weights": [0] * 4 + [1, 1]}])
        assert (batch["weights"] != 0).any(dim=1).tolist() == [False, True, False]
    model = tiny("gpt2", vocab_size=len(words))
    trainer = trained(
        model, config(tmp_path), [long, short], data_collator=collate, processing_class=words
    )
    messages = said()
    assert [x for x in messages if "max_length" in x] == messages
    assert len(messages) == 1
    assert "max_length: 4 leaves nothing to learn of 2 of the 3 examples" in messages[0]
    assert trainer.state.log_history[0]["active_rows"] == int((batch["weights"] != 0).sum())
