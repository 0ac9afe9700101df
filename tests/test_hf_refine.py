"""``generate_completions``: ends, prompts, distribution, and what an encoder-decoder model read."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import config, tiny, tokenizer

import tnt_kernels as tnt

transformers = pytest.importorskip("transformers")
generate_completions = tnt.hf.generate_completions

WORDS = tokenizer()
CAT, SAT = WORDS.encode(" cat")[0], WORDS.encode(" sat")[0]
END, OTHER, PAD = WORDS.eos_token_id, 40, 0
PROMPTS = [[30, 31], [32], [33, 34, 35]]


class Script(transformers.LogitsProcessor):
    """Makes the rows of a batch say what is written."""

    def __init__(self, rows, begin):
        self.rows, self.begin = rows, begin

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -float("inf"))
        for row, said in enumerate(self.rows):
            step = ids.size(1) - self.begin
            forced[row, said[step] if step < len(said) else 50] = 0.0
        return forced


def scripted(rows, begin=3):
    return {"logits_processor": transformers.LogitsProcessorList([Script(rows, begin)])}


def broken(ids, scores):
    raise RuntimeError("broken")


def gpt2(**options):
    return tiny("gpt2", vocab_size=len(WORDS), eos_token_id=END, **options)


def completions(*args, **options):
    return [x["completion"] for x in generate_completions(*args, **options)]


SAID = [[60, OTHER, 61, 62], [60, 61, END, 62], [60, 61, 62, 63]]


@pytest.mark.parametrize("where", ["model", "generation_config", "keyword", "tokenizer"])
@pytest.mark.parametrize("pad", [None, PAD, END, OTHER], ids=["none", "own", "end", "other_end"])
def test_a_completion_ends_with_the_first_of_the_ends(where, pad, monkeypatch):
    model, words, options = gpt2(), tokenizer(), {}
    if pad is None:
        words.pad_token = None
    ids = {"eos_token_id": [END, OTHER], "pad_token_id": pad}
    model.generation_config.eos_token_id = 70  # is said, but ends nothing unless it is asked for
    expected = [[60, OTHER], [60, 61, END], [60, 61, 62, 63]]
    if where == "model":
        model.generation_config.update(**ids)
    elif where == "generation_config":
        options["generation_config"] = transformers.GenerationConfig(do_sample=True, **ids)
    elif where == "keyword":
        options = ids
    else:
        model.generation_config.update(eos_token_id=None, pad_token_id=pad)
        expected[0] = SAID[0]
    before = model.generation_config.to_dict()
    said = completions(model, words, PROMPTS, max_new_tokens=4, **options, **scripted(SAID))
    assert said == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("pad", [PAD, END], ids=["own", "end"])
@pytest.mark.parametrize("where", ["model", "keyword"])
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(where, pad):
    """The pads behind are nothing that the model said, also where they are an end token."""
    model, options = gpt2(), {"stop_strings": ["cat s", "mat"]}
    if where == "model":
        model.generation_config.update(**options)
        options = {}
    rows = [[60, CAT, SAT, 61, 62], [60, CAT, 61, END, 62], [CAT, 61, SAT, PAD, 62]]
    said = generate_completions(
        model, WORDS, PROMPTS, max_new_tokens=5, pad_token_id=pad, **options, **scripted(rows)
    )
    assert [x["completion"] for x in said] == [[60, CAT, SAT], [60, CAT, 61, END], rows[2]]
    assert said[0]["text"].endswith(" cat sat")


def test_prompts_are_repeated_for_every_sequence():
    rows = [[60, END], [61, 62, 63], [64, END], [END]]
    said = generate_completions(
        gpt2(), WORDS, PROMPTS[:2], num_return_sequences=2, max_new_tokens=3, **scripted(rows, 2)
    )
    assert [x["prompt"] for x in said] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [x["completion"] for x in said] == rows
    assert all(x["text"] == WORDS.decode(x["completion"], skip_special_tokens=True) for x in said)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_says_what_each_prompt_says_alone(kind, beams):
    """Padding changes nothing: on the left, but of an encoder's prompts, whose positions begin at the first id."""
    ends = list(range(2, 100, 9))
    model = tiny(kind, eos_token_id=ends)
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 12, "eos_token_id": ends}
    together = generate_completions(model, WORDS, PROMPTS, **options)
    alone = [
        x for prompt in PROMPTS for x in generate_completions(model, WORDS, [prompt], **options)
    ]
    assert together == alone == generate_completions(model, WORDS, PROMPTS, batch_size=2, **options)
    lengths = [len(x["completion"]) for x in together]
    assert len(set(lengths)) > 1 or max(lengths) == 12
    for x in together:
        assert not set(x["completion"][:-1]) & set(ends)
        assert x["completion"][-1] in ends or len(x["completion"]) == 12


def test_beams_are_all_returned():
    options = {"do_sample": False, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4}
    said = generate_completions(gpt2(), WORDS, PROMPTS, **options)
    assert [x["prompt"] for x in said] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(x["completion"]) for x in said[:3]}) == 3


# --- The distribution -----------------------------------------------------------------------------

SHARPENED = {
    "do_sample": True, "temperature": 0.2, "top_k": 2, "top_p": 0.3, "min_p": 0.5, "typical_p": 0.5,
    "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 3.0, "no_repeat_ngram_size": 2,
    "bad_words_ids": [[60]], "suppress_tokens": [61, 62], "begin_suppress_tokens": [63], "min_new_tokens": 3,
    "sequence_bias": [[[64], 9.0]], "forced_eos_token_id": 5, "exponential_decay_length_penalty": [1, 2.0],
    "renormalize_logits": True, "num_beams": 2, "guidance_scale": 1.5, "early_stopping": True,
}  # fmt: skip


def test_the_models_own_distribution_is_sampled_from():
    """Whatever the generation config that came with the model holds."""
    model = gpt2()
    model.generation_config.update(**SHARPENED)
    torch.manual_seed(5)
    said = completions(model, WORDS, [PROMPTS[0]] * 2, max_new_tokens=8)
    torch.manual_seed(5)
    ids, over = torch.tensor([PROMPTS[0]] * 2), torch.zeros(2, dtype=torch.bool)
    expected: list[list[int]] = [[], []]
    model.eval()
    for _ in range(8):
        with torch.no_grad():
            drawn = torch.multinomial(model(ids).logits[:, -1].float().softmax(1), 1)
        ids = torch.cat((ids, drawn), 1)
        for row in (0, 1):
            if not over[row]:
                expected[row].append(int(drawn[row]))
            over[row] |= drawn[row, 0] == END
    assert said == expected


def test_the_caller_can_ask_for_another_distribution():
    model = gpt2()
    model.generation_config.update(repetition_penalty=3.0, suppress_tokens=[61])
    ids, given = torch.tensor([PROMPTS[0]]), {"temperature": 0.7, "top_k": 5, "max_new_tokens": 6}
    sampling = transformers.GenerationConfig(do_sample=True, **given)
    for options in ({"generation_config": sampling}, {"generation_config": sampling, "top_p": 0.5}):
        torch.manual_seed(3)
        said = completions(model, WORDS, [PROMPTS[0]], pad_token_id=PAD, **options)
        torch.manual_seed(3)
        expected = model.eval().generate(ids, pad_token_id=PAD, **options)[0, 2:].tolist()
        assert said == [expected]
    torch.manual_seed(3)
    said = completions(model, WORDS, [PROMPTS[0]], use_cache=False, **given)
    torch.manual_seed(3)
    neutral = {"repetition_penalty": 1.0, "suppress_tokens": [0], "pad_token_id": PAD}
    alone = model.generate(ids, do_sample=True, **given, **neutral)[0, 2:].tolist()
    assert said == [alone]


def test_a_model_is_as_it_was_afterwards():
    model = gpt2().train()
    model.transformer.h[0].eval()
    modes = {name: x.training for name, x in model.named_modules()}
    own = model.generation_config
    with pytest.raises(RuntimeError, match="broken"):
        generate_completions(model, WORDS, PROMPTS, max_new_tokens=1, logits_processor=[broken])
    generate_completions(model, WORDS, PROMPTS, max_new_tokens=1)
    assert {name: x.training for name, x in model.named_modules()} == modes
    assert model.generation_config is own
    assert generate_completions(model, WORDS, []) == []


# --- Prompts --------------------------------------------------------------------------------------


def test_prompts_are_texts_chats_or_ids():
    template = "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}<|bot|>"
    words = tokenizer(chat_template=template)
    from tokenizers.processors import TemplateProcessing

    words._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)]
    )
    chat = [{"role": "user", "content": "the cat"}]
    said = generate_completions(gpt2(), words, ["the cat", chat, [7, 8]], max_new_tokens=2)
    text = words.encode("the cat", add_special_tokens=False)
    user, bot = words.convert_tokens_to_ids(["<|user|>", "<|bot|>"])
    assert [x["prompt"] for x in said] == [[1, *text], [user, *text, END, bot], [7, 8]]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("the cat", {}, "prompts: a single prompt"),
        ([5, 6], {}, "prompts: a single prompt"),
        ([{"role": "user", "content": "the"}], {}, "prompts: a single prompt"),
        ([[5], []], {}, "prompts: number 1 has no tokens"),
        ([[5]], {"batch_size": 0}, "batch_size: 0, expected"),
        ([[5]], {"stopping_criteria": [broken]}, "stopping_criteria: where they end"),
    ],
)  # fmt: skip
def test_what_cannot_be_generated_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_completions(gpt2(), WORDS, prompts, **options)


def test_prompts_that_generation_changes_are_refused():
    def shortened(model, input_ids, **options):
        return input_ids[:, 1:]

    with pytest.raises(ValueError, match=r"returns \(2, 1\), not 1 continuation\(s\) of each of 2"):
        generate_completions(
            gpt2(), WORDS, [[5, 6], [7]], max_new_tokens=1, custom_generate=shortened
        )


# --- Encoder-decoder models -----------------------------------------------------------------------

LANGUAGE = 90


def seq2seq(kind):
    if kind == "t5":
        return tiny(kind)
    if kind == "bart":
        model = tiny(kind, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)
        model.generation_config.forced_bos_token_id = 0
        return model
    torch.manual_seed(0)
    sizes = {
        "d_model": 32,
        "vocab_size": 100,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "init_std": 0.3,
    }
    sizes |= {f"{x}_{y}": 4 for x in ("encoder", "decoder") for y in ("attention_heads", "ffn_dim")}
    model = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**sizes))
    if kind == "mbart-25":  # labels: X </s> language
        special = {"decoder_start_token_id": LANGUAGE}
    else:  # labels: language X </s>
        special = {"decoder_start_token_id": 2, "forced_bos_token_id": LANGUAGE}
    model.generation_config.update(**{"forced_eos_token_id": 2, **special})
    return model


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart-25", "mbart-50"])
def test_the_labels_give_what_the_decoder_read(kind):
    """Logits of generation and of the training forward: the same."""
    model = seq2seq(kind)
    start = model.generation_config.decoder_start_token_id
    bos = [] if kind in ("t5", "mbart-25") else [model.generation_config.forced_bos_token_id]
    end = 1 if kind == "t5" else 2
    rows = [[60, 61, end], [60, end], [62, 63, 64, 65, 66, 67]]
    rows = [[*bos, *row][:6] for row in rows]
    if kind.startswith("mbart"):
        rows[2][-1] = end  # forced
    sources = [[5, 6, 7, end], [8, end], [9, end]]
    script = scripted(rows, 1)
    said = generate_completions(model, WORDS, sources, max_new_tokens=6, **script)
    for x, row, source in zip(said, rows, sources, strict=True):
        assert x["prompt"] == source
        assert x["completion"] == row + ([LANGUAGE] if kind == "mbart-25" else [])
        inputs = model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([x["completion"]]))
        assert inputs[0].tolist() == [start, *x["completion"][:-1]]
        read = model.eval().generate(
            torch.tensor([source]), max_new_tokens=len(row), output_logits=True,
            return_dict_in_generate=True, **scripted([row], 1),
        )  # fmt: skip
        assert read.sequences[0].tolist() == [start, *row]
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=inputs).logits[0]
        torch.testing.assert_close(logits[: len(row)], torch.cat(read.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "own", "options", "message"),
    [
        ("mbart-25", {"forced_eos_token_id": None}, {}, "MBartForConditionalGeneration makes .* forced_eos_token_id"),
        ("mbart-50", {}, {"stop_strings": ["cat"]}, "neither stop_strings nor max_time"),
        ("t5", {}, {"decoder_start_token_id": 7}, "decoder_start_token_id: 7 of .* begins with, 0"),
        ("bart", {}, {"decoder_start_token_id": [2, 2]}, r"decoder_start_token_id: \[2, 2\], expected one"),
        ("mbart-25", {}, scripted([[60, 1, 61, 62]], 1), "expected no pads in it"),
    ],
)  # fmt: skip
def test_labels_that_give_something_else_are_refused(kind, own, options, message):
    model = seq2seq(kind)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        generate_completions(model, WORDS, [[5, 6]], max_new_tokens=5, **options)


def test_a_model_that_cannot_shift_its_labels_is_refused():
    sizes = {"d_model": 16, "vocab_size": 100, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.M2M100Config(**sizes, encoder_ffn_dim=8, decoder_ffn_dim=8)
    model = transformers.M2M100ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"model: M2M100.* expected prepare_decoder_input_ids"):
        generate_completions(model, WORDS, [[5, 6]])


# --- Adapters and rounds --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_adapters_say_their_own(kind):
    peft = pytest.importorskip("peft")
    base = tiny(kind)
    base.generation_config.update(**SHARPENED)
    own = base.generation_config
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    target = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, target_modules=target, r=4))
    for name, x in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=3.0)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": [50, 51]}
    with_adapter = completions(model, WORDS, PROMPTS, **options)
    with model.disable_adapter():
        without = completions(model, WORDS, PROMPTS, **options)
    assert with_adapter != without
    assert model.get_base_model().generation_config is own
    assert with_adapter == completions(model.merge_and_unload(), WORDS, PROMPTS, **options)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_stand_right_before_each_prompt(kind):
    peft = pytest.importorskip("peft")
    learned = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny("llama"), learned)
    prompts, options = [*PROMPTS, [36]], {"do_sample": False, "max_new_tokens": 5}
    together = generate_completions(model, WORDS, prompts, **options)
    alone = [
        x for prompt in prompts for x in generate_completions(model, WORDS, [prompt], **options)
    ]
    assert together == alone


def test_rounds_train_on_what_a_model_with_several_ends_said(tmp_path):
    model, rounds = gpt2(), []
    model.generation_config.update(eos_token_id=[END, OTHER], pad_token_id=END)

    def annotate(said):
        rounds.append([{**x, "weights": [-1.0] * len(x["completion"])} for x in said])
        return rounds[-1]

    generation = {"max_new_tokens": 4, "num_return_sequences": 2, **scripted([*SAID, *SAID])}
    done = tnt.hf.refine(
        model, WORDS, PROMPTS, annotate, config(tmp_path), rounds=2, generation=generation
    )
    assert [x.examples for x in done] == rounds
    expected = [[60, OTHER], [60, 61, END], [60, 61, 62, 63]] * 2
    assert [[x["completion"] for x in said] for said in rounds] == [expected] * 2
