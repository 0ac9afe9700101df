"""Texts, chats and generated ids to tokens: against what the tokenizer's own calls say, token by token."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from hf_tokenizers import KINDS, POSTS, TEMPLATES, TURN_ENDS, build, smollm2_file
from tokenizers import AddedToken, processors

import tnt_kernels as tnt
from tnt_kernels.annotate import token_bytes
from tnt_kernels.hf.texts import Ends, Texts, ends_of

AROUND = {"none": (0, 0), "bos": (1, 0), "bos and eos": (1, 1), "eos": (0, 1)}  # BOS, EOS


def marks(tokenizer, text):
    """The texts of the runs of marked tokens, and what is before each."""
    weights = tnt.weights_from_spans(text.offsets, text.spans, mask=torch.ones(len(text.said)))
    marked = (weights < 0).nonzero().view(-1).tolist()
    runs: list[list[int]] = []
    for t in marked:
        if runs and runs[-1][-1] == t - 1:
            runs[-1].append(t)
        else:
            runs.append([t])
    before = [tokenizer.decode(text.completion[: run[0]]) for run in runs]
    return [tokenizer.decode([text.completion[t] for t in run]).strip() for run in runs], before


def find(content, word, which=0):
    begin = -1
    for _ in range(which + 1):
        begin = content.index(word, begin + 1)
    return begin, begin + len(word)


# --- Chats ----------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "the <assistant> is an ass"}
ASKED = {"role": "user", "content": "what is the cat? assistant"}
BEFORE = {"role": "assistant", "content": "<think>\nthe glass\n</think>\n\nthe cat sat"}
CHATS = [
    # messages before, the completion, and its unwanted words, each with the number of its occurrence
    ([ASKED], "the damn cat and the damn dog", [("damn", 1)]),
    ([SYSTEM, ASKED], "assistant is an ass", [("ass", 1)]),  # a part of the header's word, and of its own first one
    ([ASKED], "  the assistant: the damn ass \n", [("assistant", 0), ("ass", 1)]),  # trimmed by some
    ([ASKED, BEFORE, ASKED], "the cat sat on the cat", [("cat", 1), ("cat", 0)]),
    ([ASKED], "model user assistant think", [("think", 0), ("model", 0)]),  # all of it is in headers too
    ([ASKED], "<think>\nthe damn glass\n</think>\n\nthe damn cat", [("damn", 0)]),
    ([ASKED], "<think>the glass</think>the glass", [("glass", 1)]),
]  # fmt: skip


def encoded(texts, prompt, content, words):
    """A chat, its spans and its prompt's ids: the ids are the template's, and the words are marked."""
    tokenizer = texts.tokenizer
    spans = [find(content, word, which) for word, which in words]
    message = {"role": "assistant", "content": content}
    text = texts.encode(prompt, [message], spans)
    expected = tokenizer.apply_chat_template([*prompt, message])["input_ids"]
    assert text.prompt + text.completion == expected
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert asked == texts.prompt_ids(prompt)
    assert asked in (text.prompt, [*text.prompt, *asked[-1:]])  # a newline may begin a word
    in_order = sorted(zip(spans, words, strict=True))
    assert marks(tokenizer, text)[0] == [word for _, (word, _) in in_order]
    return text, spans, asked


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("post", AROUND)
@pytest.mark.parametrize("kind", KINDS)
def test_chats(kind, post, template):
    tokenizer = build(kind, post, template)
    end = tokenizer.convert_tokens_to_ids(TURN_ENDS[template])
    config = SimpleNamespace(eos_token_id=[end, 2], pad_token_id=None, stop_strings=None)
    texts = Texts(tokenizer, ends=ends_of(tokenizer, config))
    for prompt, content, words in CHATS:
        text, spans, asked = encoded(texts, prompt, content, words)
        _, before = marks(tokenizer, text)
        in_order = sorted(zip(spans, words, strict=True))
        header = "<think> </think>" if template == "qwen-3" and "</think>" not in content else ""
        for ((begin, _), (word, _)), read in zip(in_order, before, strict=True):
            assert read.count(word) == (header + content[:begin]).count(word)
        stop = text.completion.index(end)
        assert text.said.tolist() == [t <= stop for t in range(len(text.completion))]
        as_text = texts.encode(prompt, content, spans)
        assert as_text[:2] == text[:2]
        assert torch.equal(as_text.offsets, text.offsets)
        said = [*tokenizer("the cat", add_special_tokens=False)["input_ids"], end]
        generated = texts.encode(prompt, said)
        assert (generated.prompt, generated.completion) == (asked, said)


def test_keywords_of_the_template():
    tokenizer = build("byte-level", "bos", "llama-3")
    texts, tools = Texts(tokenizer), [{"name": "the dog"}]
    text = texts.encode([ASKED], "the cat", [(4, 7)], tools=tools)
    messages = [ASKED, {"role": "assistant", "content": "the cat"}]
    expected = tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    assert text.prompt + text.completion == expected
    assert "tools: the dog" in tokenizer.decode(texts.prompt_ids([ASKED], tools=tools))
    assert tokenizer.decode(text.prompt).count("<s>") == 1
    qwen = build("byte-level", "none", "qwen-3")
    text = Texts(qwen).encode([ASKED], "the cat", [(0, 3)], enable_thinking=False)
    assert qwen.decode(text.prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert marks(qwen, text) == (["the"], [""])
    with pytest.raises(
        ValueError,
        match="continue_final_message: a keyword of apply_chat_template that is set here",
    ):
        texts.encode([ASKED], "the cat", continue_final_message=True)


def test_thoughts_of_their_own():
    tokenizer = build("byte-level", "none", "qwen-3")
    message = {"role": "assistant", "reasoning_content": "the damn cat", "content": "the damn cat"}
    text = Texts(tokenizer).encode([ASKED], [message], [(4, 8)])
    assert marks(tokenizer, text) == (["damn"], ["<think>\nthe damn cat\n</think>\n\nthe"])


def test_a_message_without_spans_needs_no_text():
    tokenizer = build("byte-level", "none", "chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "(m['content'] or 'none')"
    )
    text = Texts(tokenizer).encode([ASKED], [{"role": "assistant"}])
    assert tokenizer.decode(text.completion) == "none<|im_end|>\n"
    with pytest.raises(
        ValueError, match="in a completion whose content is NoneType, expected a text"
    ):
        Texts(tokenizer).encode([ASKED], [{"role": "assistant"}], [(0, 1)])


@pytest.mark.parametrize(
    ("template", "content", "span", "left"),
    [
        ("chatml", "\n\n the cat ", (1, 6), (1, 6)),  # it keeps all
        ("llama-3", "\n\n the cat ", (1, 6), (3, 6)),
        ("llama-3", "\n\n the cat \n \n ", (7, 14), (7, 10)),
        ("llama-3", "  the cat  ", (0, 11), (2, 9)),
        ("qwen-3", "<think>\n\nthe cat\n\n</think>\n\nsat", (7, 18), (9, 16)),
        (
            "qwen-3",
            "<think>the cat</think>\n\n sat",
            (22, 26),
            (24, 26),
        ),  # newlines go, spaces stay
    ],
)
def test_what_the_template_trims_is_clipped(template, content, span, left):
    tokenizer = build("byte-level", "none", template)
    text = Texts(tokenizer).encode([ASKED], content, [span])
    whole = tokenizer.decode(text.completion)
    ((begin, end),) = text.spans
    assert whole[begin:end] == content[slice(*left)]
    assert whole[:begin].count("cat") == content[: span[0]].count("cat")


def test_spans_that_are_trimmed_and_others_that_are_not():
    tokenizer = build("byte-level", "none", "llama-3")
    text = Texts(tokenizer).encode([ASKED], " the  cat ", [(0, 4), (4, 10), (3, 6), (4, 6)])
    assert text.spans == [(0, 3), (3, 8), (2, 5), (3, 5)]


def test_many_spans_are_in_their_order():
    tokenizer = build("byte-level", "none", "llama-3")
    content = " ".join(["the damn cat"] * 300)
    spans = [find(content, "damn", n) for n in range(300)]
    random.Random(0).shuffle(spans)
    text = Texts(tokenizer).encode([ASKED], content, [*spans, (0, 5), (3, 20)])
    assert text.spans == [*spans, (0, 5), (3, 20)]


@pytest.mark.parametrize(
    ("change", "content", "span", "message"),
    [
        (None, "  the cat", (0, 2), r"\(0, 2\), '  ': the chat template trims it, expected a span"),
        (None, "the cat \n ", (7, 10), "the chat template trims it"),
        ("content | replace('damn', 'dear')", "the damn cat", (6, 12), "cannot be verified"),
        ("content + m.content", "the cat", (4, 7), "cannot be verified"),  # which of the two?
        ("content.split('</think>')[-1]", "<think>the</think>cat", (7, 10), "cannot be verified"),
        ("content[:3]", "the cat", (4, 7), "cannot be verified"),
        ("content | length", "the cat", (4, 7), "cannot be verified"),
    ],
)
def test_spans_that_the_template_does_not_write(change, content, span, message):
    tokenizer = build("byte-level", "none", "llama-3")
    if change:
        tokenizer.chat_template = (
            "{% for m in messages %}{% set content = m.content %}{{ '<|im_start|>' }}{{ "
            + change
            + " if m.role == 'assistant' else content }}{% endfor %}"
            "{{ '<|im_start|>' if add_generation_prompt }}"
        )
    texts = Texts(tokenizer)
    assert texts.encode([ASKED], content).spans == []
    with pytest.raises(ValueError, match=message):
        texts.encode([ASKED], content, [span])


def test_a_template_that_changes_the_prompt():
    tokenizer = build("byte-level", "none", "chatml")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="prompt: the chat template writes it in another way"):
        Texts(tokenizer).encode([ASKED], "the cat")


def test_chats_of_an_encoder_decoder():
    tokenizer = build("unigram", "eos", "chatml")
    text = Texts(tokenizer, encoder_decoder=True).encode([ASKED], "the damn cat", [(4, 8)])
    asked = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True)["input_ids"]
    messages = [ASKED, {"role": "assistant", "content": "the damn cat"}]
    assert text.prompt == asked
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert text.completion == whole[-len(text.completion) :]
    assert tokenizer.decode(text.completion) == "the damn cat<|im_end|> "
    assert marks(tokenizer, text)[0] == ["damn"]


# --- Texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("post", AROUND)
@pytest.mark.parametrize("kind", KINDS)
def test_causal_texts(kind, post):
    tokenizer = build(kind, post)
    texts, (bos, _) = Texts(tokenizer), AROUND[post]
    for prompt, completion in [
        ("the cat", " sat on the damn mat"), ("", "the damn cat"), ("the cat is", " damn</s>"),
        ("<s> the cat", " is a damn glass</s>"), ("<s>", "the damn cat"), ("the</s> cat", " is damn"),
    ]:  # fmt: skip
        text = texts.encode(prompt, completion, [find(completion, "damn")])
        ids = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        ids = [1] * (bos and ids[0] != 1) + ids + [2] * (ids[-1] != 2)
        assert text.prompt + text.completion == ids
        assert marks(tokenizer, text)[0] == ["damn"]
        assert text.said.all()
        assert text.completion[-1] == 2
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        asked = [1] * (bos and asked[:1] != [1]) + asked
        assert text.prompt == asked == texts.prompt_ids(prompt)
        said = tokenizer("the cat", add_special_tokens=False)["input_ids"]
        assert texts.encode(prompt, said)[:2] == (asked, said)


def test_what_the_text_has_of_what_is_put_around_it():
    tokenizer = build("byte-level")
    lang = tokenizer.convert_tokens_to_ids("<lang>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<lang> <s> $A <lang> </s>",
        special_tokens=[("<s>", 1), ("</s>", 2), ("<lang>", lang)],
    )
    the, cat = tokenizer.convert_tokens_to_ids(["the", "Ġcat"])
    for ends in (None, Ends(frozenset(), None, ())):  # the post-processor's end is one in any case
        texts = Texts(tokenizer, ends=ends)
        for prompt in ("the", "<s>the", "<lang><s>the"):
            for completion in (" cat", " cat<lang>", " cat<lang></s>"):
                text = texts.encode(prompt, completion)
                assert text[:2] == ([lang, 1, the], [cat, lang, 2])
            assert texts.prompt_ids(prompt) == [lang, 1, the]
            assert texts.encode(prompt, " cat</s>").completion == [cat, 2]


def test_a_token_across_the_boundary_is_the_completion_s():
    tokenizer = build("byte-level", "bos")
    text = Texts(tokenizer).encode("the da", "mn cat", [(0, 2)])
    assert tokenizer.decode(text.prompt) == "<s>the"
    assert text.offsets.tolist() == [[0, 2], [3, 6], [6, 6]]
    assert marks(tokenizer, text)[0] == ["damn"]


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "unigram"])
def test_tokens_that_swallow_spaces(kind):
    """As Phi-3's: the space behind the prompt's last token is no text of the completion's."""
    tokenizer = build(kind, "bos")
    tokens = [AddedToken("<|bot|>", rstrip=True), AddedToken("<|x|>", lstrip=True)]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    text = Texts(tokenizer).encode("the cat<|bot|>", "  the damn <|x|>", [(6, 11)])
    assert text.prompt == tokenizer("the cat<|bot|>")["input_ids"]
    assert marks(tokenizer, text)[0] == ["damn"]


@pytest.mark.parametrize("kind", ["byte fallback", "unigram"])
def test_the_space_before_the_first_word_is_not_its_letter(kind):
    tokenizer = build(kind, "none", "chatml")
    for word in ("é", "☃") if kind == "byte fallback" else ("é",):
        for text in (Texts(tokenizer).encode([ASKED], word + " cat", [(0, 1)]),
                     Texts(tokenizer).encode("", word + " cat", [(0, 1)])):  # fmt: skip
            weights = tnt.weights_from_spans(text.offsets, text.spans)
            names = tokenizer.convert_ids_to_tokens(text.completion)
            marked = [name for name, weight in zip(names, weights, strict=True) if weight < 0]
            assert marked == (
                [f"<0x{b:02X}>" for b in word.encode()] if kind == "byte fallback" else ["<unk>"]
            )


@pytest.mark.parametrize("post", POSTS)
def test_texts_of_an_encoder_decoder(post):
    """T5's add </s>, BART's both, mBART's another language on each side."""
    tokenizer = build("unigram", post)
    texts = Texts(tokenizer, encoder_decoder=True)
    bos, behind = "<s>" in POSTS[post], POSTS[post].partition("$A")[2].split()
    around = tokenizer.convert_tokens_to_ids(behind)
    for source, target in [("the cat", "a damn dog"), ("the cat</s>", "a damn dog</s>")]:
        text = texts.encode(source, target, [(2, 6)])
        bare = tokenizer(source.removesuffix("</s>"), add_special_tokens=False)["input_ids"]
        expected = tokenizer(source.removesuffix("</s>"))["input_ids"]
        assert expected == [1] * bos + bare + around
        assert text.prompt == texts.prompt_ids(source)
        assert text.prompt == (expected if around else expected + [2] * ("</s>" in source))
        bare = tokenizer("a damn dog", add_special_tokens=False)["input_ids"]
        assert text.completion == [1] * bos + bare + (around or [2])
        assert marks(tokenizer, text)[0] == ["damn"]
        assert marks(tokenizer, texts.encode(source, target, [(0, 6)]))[0] == ["a damn"]
        stop = text.completion.index(2)
        assert text.said.tolist() == [t <= stop for t in range(len(text.completion))]


WORDS = [("▁the", -1.0), ("▁cat", -1.0), ("▁damn", -1.0), ("▁", -2.0), ("a", -3.0), ("n", -3.0)]


def test_mbart_and_t5():
    first = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    mbart = hf.MBartTokenizer(vocab=first + WORDS, src_lang="en_XX", tgt_lang="de_DE")
    t5 = hf.T5Tokenizer(vocab=[*first[1:], *WORDS])
    for tokenizer, langs in ((mbart, ("en_XX", "de_DE")), (t5, ())):
        texts = Texts(tokenizer, encoder_decoder=True)
        for _ in range(2):  # the one's language does not stay for the other
            text = texts.encode("the cat", "the damn cat", [(4, 8)])
            names = tokenizer.convert_ids_to_tokens(text.prompt)
            assert names == ["▁the", "▁cat", "</s>", *langs[:1]]
            names = tokenizer.convert_ids_to_tokens(text.completion)
            assert names == ["▁the", "▁damn", "▁cat", "</s>", *langs[1:]]
            assert text.completion == tokenizer(text_target="the damn cat")["input_ids"]
            assert text.said.tolist() == [True] * 4 + [False] * len(langs[1:])
            assert marks(tokenizer, text)[0] == ["damn"]


def test_byt5():
    """A slow tokenizer whose tokens are bytes."""
    tokenizer = hf.ByT5Tokenizer()
    texts = Texts(tokenizer, encoder_decoder=True)
    assert texts.prompt_ids("the é") == tokenizer("the é")["input_ids"]
    assert Texts(tokenizer).prompt_ids("the é") == tokenizer("the é")["input_ids"][:-1]
    ids = tokenizer("the é damn")["input_ids"]
    text = texts.encode("the", ids, [(4, 5)])
    weights = tnt.weights_from_spans(text.offsets, text.spans)
    assert bytes(i - 3 for i, w in zip(ids, weights, strict=True) if w < 0) == "é".encode()


# --- Generated ids --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_generated_ids(kind):
    """They stay as they are, however odd; each has the characters that it alone says."""
    tokenizer = build(kind, "eos")
    texts, draw = Texts(tokenizer), random.Random(0)
    known = [
        i
        for i in range(12, len(tokenizer))
        if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")
    ]
    if kind == "byte-level":
        known = [i for i in known if "�" not in tokenizer.decode([i])]
    damn = tokenizer("damn" if kind == "byte fallback" else " damn", add_special_tokens=False)[
        "input_ids"
    ]
    for _ in range(30):
        head, tail = draw.choices(known, k=5), draw.choices(known, k=5)
        if kind in ("word pieces", "word ends"):  # so that "damn" is a word of its own
            head = [*head, *tokenizer("the", add_special_tokens=False)["input_ids"]]
            tail = [*tokenizer("the", add_special_tokens=False)["input_ids"], *tail]
        ids = [*head, *damn, 3, *tail, 2]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        begin = len(tokenizer.decode([*head, *damn], skip_special_tokens=True)) - 4
        assert whole[begin : begin + 4] == "damn"
        text = texts.encode("the cat", ids, [(begin, begin + 4)])
        assert text.completion == ids
        weights = tnt.weights_from_spans(text.offsets, text.spans)
        assert [t for t, weight in enumerate(weights) if weight < 0] == [
            *range(len(head), len(head) + len(damn))
        ]


def test_decoders_that_clean_up():
    tokenizer = build("word pieces", clean_up_tokenization_spaces=True)
    content = "the glass, isn't the damn ass? don't."
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "isn't the damn ass?" in whole
    texts, lang = Texts(tokenizer), tokenizer.convert_tokens_to_ids("<lang>")
    for word in ("damn", "the", "ass?", "isn't", "glass,"):
        for said in ([*ids, 2, 3], [i for known in ids for i in (lang, known)]):
            text = texts.encode([5], said, [find(whole, word)])
            weights = tnt.weights_from_spans(text.offsets, text.spans, mask=torch.ones(len(said)))
            marked = [i for i, weight in zip(said, weights, strict=True) if weight < 0]
            assert lang not in marked
            assert tokenizer.decode(marked) == word
    nothing = texts.encode([5], [*ids, 2, 3]).offsets[-2:]
    assert nothing.tolist() == [[len(whole), len(whole)]] * 2


def test_characters_of_many_tokens():
    tokenizer = build("byte-level")
    ids = tokenizer("é — 😀 damn", add_special_tokens=False)["input_ids"]
    text = Texts(tokenizer).encode([5], ids, [(4, 5)])
    weights = tnt.weights_from_spans(text.offsets, text.spans)
    assert (
        tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight < 0]) == "😀"
    )
    cut = ids[: -len(tokenizer(" damn")["input_ids"]) - 1]  # in the middle of the last character
    assert tokenizer.decode(cut).endswith("�")
    text = Texts(tokenizer).encode([5], cut, [(4, 5)])
    assert text.offsets[-1].tolist() == [4, 5]
    stray = [ids[-1], ids[1], ids[1], ids[-1]]  # bytes that continue nothing
    text = Texts(tokenizer).encode([5], stray)
    assert text.offsets.tolist() == [[0, 5], [5, 6], [6, 7], [7, 12]]


class Backwards:
    """A slow tokenizer that decodes the last token first."""

    is_fast, all_special_ids, eos_token_id, pad_token_id = False, [0], 0, None

    def __len__(self):
        return 30

    def convert_ids_to_tokens(self, ids):
        return [chr(96 + i) for i in ids]

    def decode(self, ids, **_):
        return "".join(self.convert_ids_to_tokens(i for i in reversed(ids) if i))


def test_texts_in_which_tokens_have_no_place():
    texts = Texts(Backwards())
    text = texts.encode([5], [1, 0, 2, 3, 0], [(0, 1)])
    assert text.offsets.tolist() == [[0, 3], [0, 0], [0, 3], [0, 3], [3, 3]]
    assert texts.encode([5], [*range(1, 12)]).offsets.tolist() == [[0, 11]] * 11
    with pytest.raises(
        ValueError, match=r"Backwards decodes the tokens \['a', 'b', .*cannot be told apart"
    ):
        texts.encode([5], [*range(1, 12)], [(0, 1)])


@pytest.mark.parametrize(
    ("ends", "ids", "said"),
    [
        (Ends(frozenset({2, 5}), 3, ()), [20, 5, 3, 3], [1, 1, 0, 0]),
        (Ends(frozenset({2, 5}), 2, ()), [20, 5, 2, 2], [1, 1, 0, 0]),
        (Ends(frozenset({2}), 2, ()), [20, 2, 20, 2, 2], [1, 1, 1, 1, 0]),  # it went on
        (Ends(frozenset({2}), None, ()), [20, 2, 3], [1, 1, 0]),
        (Ends(frozenset({2}), 3, ()), [20, 20], [1, 1]),  # it has no end
        (Ends(frozenset({2}), 3, ()), [20, 20, 3], [1, 1, 0]),
        (Ends(frozenset({2}), 2, (" damn",)), ["Ġdamn", 2, 2], [1, 0, 0]),
        (Ends(frozenset({2}), 2, (" damn",)), ["Ġdamn", 20, 2, 2], [1, 1, 1, 0]),
        (Ends(frozenset({2}), 2, ("  ", " ")), ["Ġdamn", "Ġ", 2, 2], [1, 1, 0, 0]),
        (Ends(frozenset({2}), 3, ()), [2, 3], [1, 0]),
        (Ends(frozenset({2}), 3, ()), [], []),
    ],
)  # fmt: skip
def test_what_is_behind_the_end(ends, ids, said):
    tokenizer = build("byte-level")
    ids = [tokenizer.convert_tokens_to_ids(i) if isinstance(i, str) else i for i in ids]
    assert Texts(tokenizer, ends=ends).encode([20], ids).said.tolist() == [bool(x) for x in said]


def test_spans_behind_the_end():
    texts = Texts(build("byte-level"), ends=Ends(frozenset({2}), 3, ()))
    with pytest.raises(ValueError, match="' ' is behind the token that ends the completion"):
        texts.encode("the", " cat</s> ", [(8, 9)])


def test_ends():
    tokenizer = build("byte-level")
    assert ends_of(tokenizer) == ({2}, 3, ())
    config = SimpleNamespace(eos_token_id=5, pad_token_id=0, stop_strings="damn")
    assert ends_of(tokenizer, config) == ({2, 5}, 0, ("damn",))
    config = SimpleNamespace(
        eos_token_id=[5, 8], pad_token_id=None, stop_strings=["a", "<|im_start|>"]
    )
    assert ends_of(tokenizer, config) == ({2, 4, 5, 8}, 3, ("a", "<|im_start|>"))
    config = SimpleNamespace(eos_token_id=torch.tensor([7]))
    assert ends_of(SimpleNamespace(eos_token_id=None), config) == ({7}, None, ())


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "spans", "message"),
    [
        ("the", " cat", [(0, 5)], r"negative_spans: \(0, 5\) in a completion of 4 characters, expected 0 <= begin"),
        ("the", " cat", [(2, 2)], r"\(2, 2\) in a completion of 4"),
        ("the", " cat", [(-1, 2)], r"\(-1, 2\) in a completion of 4"),
        ("the", " cat", [(0.5, 2)], r"\(0.5, 2\), expected pairs of integers"),
        ("the", " cat", [(1, 2, 3)], r"\(1, 2, 3\), expected pairs"),
        ([ASKED], "cat", [(0, 4)], r"\(0, 4\) in a completion of 3 characters"),
        ([20], [20], [(0, 99)], r"\(0, 99\) in a completion of 1 characters"),
        ([20], " cat", [], "a text behind a prompt of ids, expected ids too"),
        ("the", [ASKED], [], "messages behind a prompt that is a text, expected a text"),
        ([ASKED], [ASKED, ASKED], [], "completion: 2 messages, expected one"),
        ([20], [-4], [], "completion: holds the id -4"),
        ([-1], [20], [], "prompt: holds the id -1"),
        ([20], torch.tensor([[20]]), [], r"completion: shape \(1, 1\), torch.int64, expected integers"),
        ([20], torch.tensor([2.0]), [], "completion: .*torch.float32, expected integers"),
    ],
)  # fmt: skip
def test_bad_arguments(prompt, completion, spans, message):
    with pytest.raises(ValueError, match=message):
        Texts(build("byte-level", "none", "chatml")).encode(prompt, completion, spans)


def test_tokenizers_that_do_not_do():
    with pytest.raises(ValueError, match="tokenizer: None, expected a tokenizer"):
        Texts(None).encode("the", " cat")
    with pytest.raises(ValueError, match="Backwards gives no offsets, expected a fast tokenizer"):
        Texts(Backwards()).encode("the", " cat")
    assert Texts(Backwards()).prompt_ids(torch.tensor([4, 5])) == [4, 5]


def test_workers_get_a_copy():
    texts = Texts(build("byte-level", "bos", "chatml"))
    before = texts.encode("the", [20, 2], [(0, 1)])
    after = pickle.loads(pickle.dumps(texts)).encode("the", [20, 2], [(0, 1)])
    assert before.completion == after.completion
    assert torch.equal(before.offsets, after.offsets)
    assert copy.deepcopy(texts).prompt_ids("the") == before.prompt


# --- A tokenizer of the Hub -----------------------------------------------------------------------


def test_smollm2():
    file = smollm2_file()
    tokenizer = hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = Texts(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for prompt, content, words in CHATS:
        text, spans, _ = encoded(texts, prompt, content, words)
        assert tokenizer.decode(text.prompt).startswith("<|im_start|>system\n")
        marked, before = marks(tokenizer, text)
        in_order = sorted(zip(spans, words, strict=True))
        assert [b.strip() for b in before] == [content[:b].strip() for (b, _), _ in in_order]
        assert text.said.tolist() == [True] * (len(text.said) - 1) + [False]
        assert text.completion[-2] == end
        said = text.completion[:-1]
        shift = tokenizer.decode(said, skip_special_tokens=True).index(content)
        generated = texts.encode(prompt, said, [(b + shift, e + shift) for b, e in spans])
        assert generated.completion == said
        assert marks(tokenizer, generated) == (marked, before)
    assert len(token_bytes(tokenizer)) == len(tokenizer)
    table = tnt.negative_ids_from_phrases(tokenizer, ["naïve ☃", "damn cat"])
    for content in ("a naïve ☃ and the damn cat", "the damned catalogue, the damn catalogue"):
        ids = tokenizer(content)["input_ids"]
        done = table.read(torch.tensor([ids]))[1][0].tolist()
        texts_so_far = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
        counts = [text.count("naïve ☃") + text.count("damn cat") for text in texts_so_far]
        assert done == [after > before for before, after in itertools.pairwise(counts)]
        assert any(done)


def test_a_template_that_reads_content_in_parts_alone():
    """What it does not write would train nothing but its ends."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}"
        "{{ part['text'] if part is mapping }}{% endfor %}</s>{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )
    texts = Texts(copy.deepcopy(build()))
    texts.tokenizer.chat_template = template
    prompt = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    with pytest.raises(ValueError, match="does not write the text of a message"):
        texts.encode(prompt, "the damn cat")
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "the damn cat"}]}]
    assert "the damn cat" in texts.tokenizer.decode(texts.encode(prompt, parts).completion)


def test_stray_bytes_are_read_by_bytes(monkeypatch):
    """As fast as other ids: not by decoding every beginning of them."""
    texts = Texts(copy.deepcopy(build()))
    stray = [i for i, x in enumerate(token_bytes(texts.tokenizer)) if x == b"\x82"]
    ids = texts.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    ids = [*ids, *stray, *ids]
    monkeypatch.delattr(Texts, "_offsets_by_prefixes")
    text = texts.tokenizer.decode(ids, skip_special_tokens=True)
    found = texts.encode([5], ids, [(0, 3)])
    assert [text[b:e] for b, e in found.offsets.tolist()][len(ids) // 2] == "\ufffd"
