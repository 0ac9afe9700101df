"""Batches of annotated texts: what the trainer gets from each kind of example."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import VOCAB, config, tiny, tokenizer, trained

import tnt_kernels as tnt

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}{{ m['content'] }}"
    "{{ '</s>' if m['role'] != 'user' }}{% endfor %}{{ '<|bot|>' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def words():
    return tokenizer(chat_template=TEMPLATE)


def rows(words, batch, row=0):
    """(token, weight) of every token with a label."""
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    assert batch["labels"].shape == batch["weights"].shape == ids.shape
    return [
        (words.decode([i]), w)
        for i, w in zip(batch["labels"][row].tolist(), batch["weights"][row].tolist(), strict=True)
        if i != -100
    ]


def test_ids():
    collate = tnt.hf.TNTDataCollator(pad_to_multiple_of=4)
    batch = collate(
        [
            {"input_ids": [5, 6, 7], "weights": [1, -1, 0], "negative_ids": [[8, 9], [], [3]]},
            {"input_ids": [4, 4, 4, 4, 4], "labels": [-100, 4, 4, -100, 4], "weights": [1] * 5},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [4] * 5 + [0] * 3]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert batch["labels"].tolist() == [[-100, 6] + [-100] * 6, [-100, 4, 4, -100, 4] + [-100] * 3]
    assert batch["weights"].tolist() == [[0, -1] + [0] * 6, [0, 1, 1, 0, 1, 0, 0, 0]]
    assert (batch["negative_ids"] == -1).all()  # theirs have no label
    one = collate([{"input_ids": [5, 6], "weights": [0, 1], "negative_ids": [[], [8, 9]]}])
    assert one["negative_ids"][0].tolist() == [[-1, -1], [9, 8], [-1, -1], [-1, -1]]


def test_texts_with_spans(words):
    collate = tnt.hf.TNTDataCollator(words)
    example = {"prompt": "the dog", "completion": " sat on the mat", "negative_spans": [(8, 11)]}
    batch = collate([example])
    assert words.decode(batch["input_ids"][0]) == "the dog sat on the mat</s>"
    found = rows(words, batch)
    assert "".join(token for token, _ in found) == " sat on the mat</s>"
    assert [token for token, weight in found if weight < 0] == [" the"]
    assert found[-1] == ("</s>", 1.0)
    assert (batch["labels"][0, : -len(found)] == -100).all()


def test_truncation_clips_spans(words):
    whole = tnt.hf.TNTDataCollator(words)(
        [{"prompt": "the", "completion": " mat and the dog", "negative_spans": []}]
    )["input_ids"][0]
    for length in range(2, len(whole)):
        collate = tnt.hf.TNTDataCollator(words, max_length=length)
        spans = [(1, 15), (13, 16)]
        batch = collate(
            [{"prompt": "the", "completion": " mat and the dog", "negative_spans": spans}]
        )
        assert batch["input_ids"][0].tolist() == whole[:length].tolist()
        assert all(weight < 0 for _, weight in rows(words, batch))


def test_corrections(words):
    example = {"prompt": "the cat", "negative": " sat on the mat", "corrected": " sat on the dog"}
    for mode, expected in (("first", [" mat"]), ("diff", [" mat"])):
        found = rows(words, tnt.hf.TNTDataCollator(words, correction=mode)([example]))
        assert [token for token, weight in found if weight < 0] == expected
    found = rows(words, tnt.hf.TNTDataCollator(words, correction="full")([example]))
    assert {weight for _, weight in found} == {-1.0}


def test_generated_ids_stay_as_they_are(words):
    letters = [words.convert_tokens_to_ids(c) for c in ("Ġ", "m", "a", "t")]
    prompt = words("the cat")["input_ids"]
    example = {"prompt": prompt, "completion": letters, "negative_spans": [(2, 4)]}
    batch = tnt.hf.TNTDataCollator(words)([example])
    assert batch["input_ids"][0].tolist() == prompt + letters  # " mat" is one token otherwise
    assert batch["weights"][0, len(prompt) :].tolist() == [1, 1, -1, -1]
    weighted = {"prompt": prompt, "completion": letters, "weights": [1, 0, -0.5, -1]}
    batch = tnt.hf.TNTDataCollator(words)([weighted])
    assert batch["weights"][0, len(prompt) :].tolist() == [1, 0, -0.5, -1]


def test_chat(words):
    prompt = [{"role": "user", "content": "the cat"}]
    completion = [{"role": "assistant", "content": "sat on the mat"}]
    collate = tnt.hf.TNTDataCollator(words)
    for example in (
        {"prompt": prompt, "completion": completion},
        {"prompt": prompt, "completion": "sat on the mat"},
        {"messages": prompt + completion},
    ):
        batch = collate([{**example, "negative_spans": [(7, 10)]}])
        assert words.decode(batch["input_ids"][0]) == "<|user|>the cat<|bot|>sat on the mat</s>"
        found = rows(words, batch)
        assert [token for token, weight in found if weight < 0] == [" the"]
        assert found[-1] == ("</s>", 1.0)


def test_encoder_decoder_reads_the_true_ids(words):
    collate = tnt.hf.TNTDataCollator(words, tiny("t5"))
    labels, weights = [10, 11, 12], [1, 0, -1]
    batch = collate([{"input_ids": [5, 6], "labels": labels, "weights": weights},
                     {"input_ids": [5], "labels": [13, -100], "weights": [1, 1]}])  # fmt: skip
    assert batch["decoder_input_ids"].tolist() == [[0, 10, 11], [0, 0, 0]]
    assert batch["labels"].tolist() == [[10, -100, 12], [13, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    batch = collate([{"prompt": "the cat", "completion": "sat", "negative_spans": [(0, 3)]}])
    assert rows(words, batch)[-1] == ("</s>", 1.0)
    assert words.decode(batch["input_ids"][0]) == "the cat"
    with pytest.raises(ValueError, match="-100 before the last token"):
        collate([{"input_ids": [5], "labels": [10, -100, 12], "weights": [1, 1, 1]}])


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_phrases(words, kind):
    phrases = tnt.negative_ids_from_phrases(words, ["cat sat"])
    collate = tnt.hf.TNTDataCollator(words, tiny(kind), phrases=phrases)
    batch = collate(
        [{"prompt": "the", "completion": " cat sat"}, {"prompt": "a", "completion": " dog"}]
    )
    labels, ids = batch["labels"], batch["negative_ids"]
    for t in range(labels.size(1)):
        if labels[0, t] != -100:
            before = words.decode([i for i in labels[0, :t] if i != -100])
            expected = {
                i for i in range(5, len(words)) if (before + words.decode([i])).count("cat sat") > 0
            }
            assert {*ids[0, t].tolist()} - {-1} == (expected if before.endswith("cat") else set())
    assert (ids[0] >= 0).any()
    assert not (ids[1] >= 0).any()


TEXT = {"prompt": "the", "completion": " cat"}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"text": "the cat"},
            r"found the columns text, expected \(input_ids, labels, weights\), \(prompt",
        ),
        (
            {"input_ids": [5, 6], "labels": [5, 6]},
            "found the columns input_ids, labels, neither weights",
        ),
        (TEXT, "found the columns completion, prompt, nothing that says what is unwanted"),
        ({"prompt": "the", "negative": " cat"}, "found the columns negative, prompt, expected"),
        (
            {"input_ids": [5, 6], "weights": [1]},
            "weights: 1 of them, expected 2, as many as labels",
        ),
        ({"input_ids": [5, 6], "labels": [5], "weights": [1]}, "labels: 1 of them, expected 2"),
        ({"input_ids": [5, 6], "weights": [[1, 1]]}, r"weights: shape \(1, 2\), expected \(T,\)"),
        ({**TEXT, "negative_spans": [(0, 5)]}, r"\(0, 5\) in a completion of 4 characters"),
        ({**TEXT, "negative_spans": [(2, 2)]}, r"\(2, 2\) in a completion"),
        (
            {**TEXT, "weights": [1, 1, 1]},
            "weights: 3 of them, expected 2, as many as the completion's ids",
        ),
        (
            {"input_ids": [5, VOCAB], "weights": [1, 1]},
            f"input_ids: holds the id {VOCAB}, expected ids below",
        ),
        (
            {"input_ids": [5, 6], "weights": [1, 1], "negative_ids": [[], [VOCAB]]},
            "negative_ids: holds the id",
        ),
        (
            {"input_ids": [5], "weights": [1], "ref_hidden_states": torch.zeros(2, 4)},
            "ref_hidden_states: 2",
        ),
        ({"prompt": [5], "completion": " cat", "weights": [1]}, None),
        ({"prompt": [5], "completion": [6], "weights": [1, 1]}, "weights: 2 of them, expected 1"),
    ],
)
def test_bad_examples(words, example, message):
    collate = tnt.hf.TNTDataCollator(words, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=message or "a text behind a prompt of ids"):
        collate([example])


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer: None"):
        tnt.hf.TNTDataCollator()([{**TEXT, "negative_spans": []}])


# --- Columns that go together ---------------------------------------------------------------------


def test_a_completion_can_be_corrected(words):
    """As ``generate_completions`` names what the model said."""
    said = {"prompt": "the cat", "negative": " sat on the mat", "corrected": " sat on the dog"}
    other = {**said, "completion": said["negative"]}
    del other["negative"]
    collate = tnt.hf.TNTDataCollator(words)
    expected, found = collate([said]), collate([other])
    assert (expected["weights"] < 0).any()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    "more",
    [
        {"negative": " dog"},
        {"weights": [1, 1], "negative_spans": [(0, 2)]},
        {"corrected": " dog", "negative_spans": [(0, 2)]},
        {"corrected": " dog", "weights": [1, 1]},
    ],
)
def test_columns_that_say_the_same(words, more):
    with pytest.raises(ValueError, match=r"found the columns \w+, \w+, expected one of them alone"):
        tnt.hf.TNTDataCollator(words)([{**TEXT, **more}])


def test_spans_of_tables(words):
    """Lists, tensors and arrays, and None where a row has none."""
    datasets = pytest.importorskip("datasets")
    columns = {"prompt": ["the", "a"], "completion": [" cat sat", " dog"]}
    table = datasets.Dataset.from_dict({**columns, "negative_spans": [[[1, 4], [5, 8]], [[1, 4]]]})
    collate = tnt.hf.TNTDataCollator(words)
    batches = [
        collate(list(x)) for x in (table, table.with_format("torch"), table.with_format("numpy"))
    ]
    assert (batches[0]["weights"] < 0).sum() == 3
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], x) for name, x in batches[0].items())


def test_tools_of_tables():
    """A table gives every tool the keys of all; the prompt has only those that were there."""
    datasets = pytest.importorskip("datasets")
    template = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + TEMPLATE
    words = tokenizer(chat_template=template)

    def tool(name):
        return {"name": "f", "parameters": {name: {"type": "string"}}}

    example = {
        "messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}],
        "negative_spans": [[0, 3]],
        "tools": [tool("a"), tool("b")],
    }
    collate = tnt.hf.TNTDataCollator(words)
    expected = collate([example])["input_ids"]
    assert "null" not in words.decode(expected[0])
    assert '{"a": {"type": "string"}}' in words.decode(expected[0])
    table = datasets.Dataset.from_list([example])
    assert torch.equal(collate(list(table))["input_ids"], expected)


def test_a_processor_has_the_template(words):
    class Processor(transformers.ProcessorMixin):
        def __init__(self, tokenizer, chat_template=None):
            self.tokenizer, self.chat_template = tokenizer, chat_template

    chat = {
        "messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}],
        "negative_spans": [(0, 3)],
    }
    plain = tokenizer()
    expected = tnt.hf.TNTDataCollator(words)([chat])["input_ids"]
    for processor in (Processor(plain, TEMPLATE), Processor(words)):
        assert torch.equal(tnt.hf.TNTDataCollator(processor)([chat])["input_ids"], expected)
    assert plain.chat_template is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length: 0, expected at least 1"),
        ({"max_length": -1}, "max_length: -1"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of: -8"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tnt.hf.TNTDataCollator(**options)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "examples: none, expected at least one"),
        ([{"input_ids": [], "weights": []}], "input_ids: no tokens that are not padding"),
        ([{"input_ids": [5], "weights": [1], "attention_mask": [0]}], "input_ids: no tokens"),
        ([{"prompt": "", "completion": "the cat", "negative_spans": [(0, 3)]}], "on the first token of a text"),
        ([{"input_ids": [5], "weights": [1], "ref_hidden_states": [1.0]}], r"ref_hidden_states: shape \(1,\)"),
        ([{"input_ids": [5], "weights": [1], "ref_hidden_states": [[float("nan")]]}], "expected .*, finite"),
        ([{"input_ids": [5], "weights": [1], "ref_hidden_states": torch.zeros(1, n)} for n in (2, 3)],
         r"ref_hidden_states: shapes \(1, 2\), \(1, 3\), expected the same but for the first"),
    ],
)  # fmt: skip
def test_bad_batches(words, examples, message):
    with pytest.raises(ValueError, match=message):
        tnt.hf.TNTDataCollator(words)(examples)


def test_masks_of_images_are_no_masks_of_tokens():
    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask, pixel_values, pixel_attention_mask):
            pass

    example = {
        "input_ids": [5, 6],
        "weights": [0, 1],
        "pixel_attention_mask": torch.ones(1, 2, 4, 4),
    }
    batch = tnt.hf.TNTDataCollator(model=Model())([example, example])
    assert batch["pixel_attention_mask"].shape == (2, 2, 4, 4)


def test_a_trainer_tells_the_collator_of_its_model(words, tmp_path):
    """Also that it is an encoder-decoder."""
    model = tiny("t5", vocab_size=len(words))
    example = {"prompt": "the cat", "completion": "sat on", "negative_spans": [(0, 3)]}
    trainer = trained(
        model, config(tmp_path), [example] * 2, data_collator=tnt.hf.TNTDataCollator(words), processing_class=words
    )  # fmt: skip
    assert 0 < trainer.state.log_history[0]["negative_share"] < 1
