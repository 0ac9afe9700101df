"""Annotations as weights and negative ids: against what they mean, said in plain loops and regular expressions."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch

import tnt_kernels as tnt
from tnt_kernels.annotate import token_bytes, token_offsets

# --- Spans ----------------------------------------------------------------------------------------

OFFSETS = [[0, 0], [0, 3], [3, 6], [6, 10], [0, 0]]  # BOS, three tokens, padding


@pytest.mark.parametrize(
    ("spans", "mode", "expected"),
    [
        ([], "all", [0, 1, 1, 1, 0]),
        ([(3, 6)], "all", [0, 1, -1, 1, 0]),
        ([(2, 7)], "all", [0, -1, -1, -1, 0]),
        ([(2, 7)], "first", [0, -1, 1, 1, 0]),
        ([(0, 1), (9, 10)], "all", [0, -1, 1, -1, 0]),
        ([(4, 5), (2, 7)], "first", [0, -1, -1, 1, 0]),
        ([(9, 99)], "all", [0, 1, 1, -1, 0]),  # goes on beyond what the tokens cover
    ],
)
def test_spans(spans, mode, expected):
    assert tnt.weights_from_spans(OFFSETS, spans, mode).tolist() == expected


def test_spans_of_a_batch_and_its_mask():
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]])
    weights = tnt.weights_from_spans([OFFSETS, OFFSETS], [[(3, 6)], []], mask=mask)
    assert weights.tolist() == [[1, 1, -1, 1, 0], [1, 1, 0, 1, 1]]
    assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((OFFSETS, [(3, 3)]), r"\(3, 3\) of text 0, expected .*begin < end"),
        ((OFFSETS, [(-1, 3)]), r"\(-1, 3\)"),
        ((OFFSETS, [(10, 12)]), r"\(10, 12\) of text 0 is inside no token.*up to character 10"),
        ((OFFSETS, [(0, 1)], "last"), "mode is 'last', expected one of 'all', 'first'"),
        (([OFFSETS], [[], []]), "spans: 2 lists, expected 1"),
        (([1, 2], []), r"offset_mapping: shape \(2,\), expected"),
    ],
)
def test_bad_spans(arguments, message):
    with pytest.raises(ValueError, match=message):
        tnt.weights_from_spans(*arguments)


def test_a_span_between_tokens_is_an_error():
    with pytest.raises(ValueError, match="inside no token"):
        tnt.weights_from_spans([[0, 2], [3, 5]], [(2, 3)])


# --- Blocklists -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["all", "first", "last"])
def test_blocklist_of_ids(mode):
    draw = random.Random(0)
    ids = torch.tensor([draw.choices(range(3), k=20) for _ in range(30)])
    ids[:5, 15:] = -1
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) > 0.1
    sequences = [[0, 1], [2], [1, 1, 0], [0, 0, 0, 0], list(range(30))]
    expected = (mask & (ids >= 0)).float()
    for row in range(len(ids)):
        for sequence in sequences[:-1]:
            n = len(sequence)
            for t in range(20 - n + 1):
                if ids[row, t : t + n].tolist() == sequence and mask[row, t : t + n].all():
                    chosen = {"all": range(n), "first": [0], "last": [n - 1]}[mode]
                    expected[row, [t + j for j in chosen]] = -1
    assert torch.equal(tnt.weights_from_blocklist(ids, sequences, mode, mask=mask), expected)
    one = tnt.weights_from_blocklist(ids[0], sequences, mode, mask=mask[0])
    assert torch.equal(one, expected[0])


def test_bad_blocklists():
    with pytest.raises(ValueError, match="an empty one"):
        tnt.weights_from_blocklist([1, 2], [[1], []])
    with pytest.raises(ValueError, match=r"ids: shape \(1, 1, 1\)"):
        tnt.weights_from_blocklist(torch.zeros(1, 1, 1, dtype=torch.int64), [[1]])
    with pytest.raises(ValueError, match=r"mask: shape \(3,\), expected \(2,\)"):
        tnt.weights_from_blocklist([1, 2], [[1]], mask=[1, 1, 1])


# --- Corrections ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("first", [[1, -1, 1, 1], [1, 1, -1, 0], [1, 1, 0, 0]]),
        ("diff", [[1, -1, 1, -1], [1, 1, -1, 0], [1, 1, 0, 0]]),
        ("full", [[-1, -1, -1, -1], [-1, -1, -1, 0], [-1, -1, 0, 0]]),
    ],
)
def test_corrections(mode, expected):
    negative = [[5, 6, 7, 8], [5, 6, 7, 0], [5, 6, 0, 0]]
    corrected = [[5, 9, 7, 1, 1], [5, 6, 0, 0, 0], [5, 6, 3, 0, 0]]  # longer ones are cut
    assert tnt.weights_from_correction(negative, corrected, mode).tolist() == expected
    for row, (n, c) in enumerate(zip(negative, corrected, strict=True)):
        assert tnt.weights_from_correction(n, c, mode).tolist() == expected[row]


def test_a_text_that_is_right_is_kept():
    """The authors' converters would mark the first token of the first text: an argmax of nothing is 0."""
    said = torch.tensor([[4, 5, 6, 0], [4, 5, 6, 7]])
    better = torch.tensor([[4, 5, 6, 0, 0], [4, 9, 6, 7, 8]])
    for mode in ("first", "diff"):
        weights = tnt.weights_from_correction(said, better, mode)
        assert weights.tolist() == [[1, 1, 1, 0], [1, -1, 1, 1]]


def test_a_correction_that_is_shorter():
    assert tnt.weights_from_correction([4, 5, 6], [4]).tolist() == [1, -1, 1]
    assert tnt.weights_from_correction([4, 0, 6], [4, 0], "diff", pad_id=-1).tolist() == [1, 1, -1]


def test_bad_corrections():
    with pytest.raises(ValueError, match=r"corrected: shape .*expected as many texts"):
        tnt.weights_from_correction([[1, 2]], [1, 2])
    with pytest.raises(ValueError, match="mode is 'last'"):
        tnt.weights_from_correction([1], [1], "last")


# --- Phrases --------------------------------------------------------------------------------------

PIECES = [
    *b" class|cl|as|ass|s|Class|classes|_class|\xc3\x9fclass|a class a class".split(b"|"),
    *b" of| course|off|iter| it|er|!iterclass|_| \n|\xe2\x80\x9c".split(b"|"),
]
TOKENS = [bytes([byte]) for byte in range(256)] + PIECES
PHRASES = [
    ["class"], ["class", "ass", "a"], ["iter", "IterClass"], ["of course"], ["as a", "s"], ["ß"],
]  # fmt: skip


def occurrences(phrases: list[str], text: bytes, word_start: bool) -> int:
    """How many times a text holds one of ``phrases``, said with regular expressions."""
    if not word_start:
        patterns = [b"(?=%s)" % re.escape(phrase.encode()) for phrase in phrases]
        return sum(len(re.findall(pattern, text)) for pattern in patterns)
    patterns = [phrase.encode().replace(b" ", b"[^a-z0-9_]") for phrase in phrases]
    beginnings = [rb"(?<![a-z0-9_])(?=%s)" % pattern for pattern in patterns]
    return sum(len(re.findall(beginning, text, re.IGNORECASE)) for beginning in beginnings)


@pytest.mark.parametrize("word_start", [True, False], ids=["words", "anywhere"])
@pytest.mark.parametrize("phrases", PHRASES, ids="/".join)
def test_phrases_agree_with_decoded_text(phrases, word_start):
    if word_start and phrases == ["ß"]:
        pytest.skip("not ASCII: no word")
    table = tnt.NegativePhrases(phrases, TOKENS, ignore_case=word_start, word_start=word_start)
    draw = random.Random(0)
    weights = [1] * 256 + [30] * len(PIECES)
    ids = torch.tensor([draw.choices(range(len(TOKENS)), weights, k=12) for _ in range(10)])
    first = (b" " + phrases[0].encode())[:12]
    ids[0, : len(first)] = torch.tensor(list(first))  # the first tokens are the bytes
    completed = table.read(ids)[1]
    assert completed[0, len(first) - 1]
    after, at = table.after(ids), table.at(ids)
    for row, text in enumerate(ids):
        for n in range(len(text)):
            prefix = b"".join(TOKENS[i] for i in text[:n])
            before = occurrences(phrases, prefix, word_start)
            expected = {
                i
                for i, token in enumerate(TOKENS)
                if occurrences(phrases, prefix + token, word_start) > before
            }
            assert {*at[row, n].tolist()} - {-1} == expected
            assert (at[row, n] >= 0).sum() == len(expected)
            if n:
                assert {*after[row, n - 1].tolist()} - {-1} == expected
            assert bool(completed[row, n]) == (int(text[n]) in expected)


def test_every_split_of_a_word_is_caught():
    table = tnt.NegativePhrases(["iter"], TOKENS, ignore_case=True, word_start=True)

    def completed(*tokens: bytes) -> list[bool]:
        return table.read(torch.tensor([[TOKENS.index(t) for t in tokens]]))[1][0].tolist()

    assert completed(b"iter") == [True]  # the beginning of a text is the beginning of a word
    assert completed(b"i", b"t", b"e", b"r", b"s") == [False, False, False, True, False]
    assert completed(b" it", b"er") == [False, True]
    assert completed(b"\xe2", b"\x80", b"\x9c", b"I", b"T", b"er")[-1]
    assert completed(b"_", b"iter", b"a", b"iter") == [False] * 4
    assert completed(b" it", b" it", b"er") == [False, False, True]


def test_texts_that_are_unwanted_from_a_place_on():
    table = tnt.NegativePhrases(["iter"], TOKENS)
    ids = torch.tensor([[TOKENS.index(t) for t in (b"iter", b" it", b"er")]] * 2)
    ids[1, 2] = TOKENS.index(b"s")
    assert table.completed(ids).tolist() == [True, True]
    assert table.completed(ids, 1).tolist() == [True, False]


def test_padding_is_a_boundary():
    table = tnt.NegativePhrases(["iter"], TOKENS)
    it, er = TOKENS.index(b" it"), TOKENS.index(b"er")
    ids = torch.tensor([[it, -100, er], [it, er, 10**6]])
    assert table.read(ids)[1].tolist() == [[False, False, False], [False, True, False]]
    assert table.at(ids[:, :0]).shape == (2, 0, 0)


def test_negative_ids_go_into_the_loss():
    table = tnt.NegativePhrases(["class"], TOKENS)
    ids = torch.tensor([[TOKENS.index(t) for t in (b"cl", b"ass", b"s")]])
    logits = torch.randn(1, 3, len(TOKENS), requires_grad=True)
    _, stats = tnt.tnt_loss(
        logits,
        logits.detach(),
        ids,
        negative_ids=table.at(ids),
        return_stats=True,
        reduction="none",
    )
    whole = logits.detach().softmax(-1)
    for t, prefix in enumerate((b"", b"cl", b"class")):
        before = prefix.count(b"class")
        unwanted = [i for i, x in enumerate(TOKENS) if (prefix + x).count(b"class") > before]
        torch.testing.assert_close(stats.negative_mass[0, t], whole[0, t, unwanted].sum())


def test_bad_phrases():
    with pytest.raises(ValueError, match="the text 'class', expected a list"):
        tnt.NegativePhrases("class", TOKENS)
    with pytest.raises(ValueError, match="expected at least one text, and none of them empty"):
        tnt.NegativePhrases(["class", ""], TOKENS)
    with pytest.raises(ValueError, match=r"ids: shape \(3,\)"):
        tnt.NegativePhrases(["class"], TOKENS).read(torch.zeros(3, dtype=torch.int64))


def test_many_phrases():
    """The automaton grows with the text of the phrases, not with the vocabulary times that."""
    draw = random.Random(0)
    phrases = {"".join(draw.choices("aslci er", k=draw.randint(4, 9))) for _ in range(500)}
    table = tnt.NegativePhrases(phrases, TOKENS)
    ids = torch.randint(256, len(TOKENS), (4, 30), generator=torch.Generator().manual_seed(0))
    for row, done in zip(ids, table.read(ids)[1], strict=True):
        texts = [b"".join(TOKENS[i] for i in row[:n]) for n in range(31)]
        counts = [occurrences([*phrases], text, False) for text in texts]
        assert done.tolist() == [b > a for a, b in itertools.pairwise(counts)]


# --- Tokenizers -----------------------------------------------------------------------------------


def build(kind: str):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    corpus = ["the classes of a class, of course", "naïve façade — “quoted” ß"] * 3
    special = ["<pad>", "<s>", "</s>"]
    if kind == "byte-level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
    elif kind == "byte fallback":
        first = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        vocab = {token: i for i, token in enumerate(first)}
        for piece in ["▁", *"theclasofurk,", "▁c", "la", "ss", "cla", "class", "▁class"]:
            vocab.setdefault(piece, len(vocab))
        merges = [("▁", "c"), ("l", "a"), ("s", "s"), ("c", "la"), ("cla", "ss"), ("▁", "class")]
        model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        tokenizer.add_special_tokens(special)
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60,
            special_tokens=[*special, "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus, trainer)
    elif kind == "word ends":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
        trainer = trainers.BpeTrainer(
            vocab_size=90,
            special_tokens=[*special, "<unk>"],
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus, trainer)
    elif kind == "replaced":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "~")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("~", "merged_with_next")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("~", " "), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            vocab_size=70, special_tokens=[*special, "<unk>"], show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
    elif kind == "no decoder":  # words, and spaces between them
        known = dict.fromkeys([*special, "<unk>", "class", ",", *corpus[0].split()])
        vocab = {token: i for i, token in enumerate(known)}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([*special, "<unk>"])
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(
            vocab_size=80, special_tokens=[*special, "<unk>"], show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(["of course"])
    return tokenizer


KINDS = (
    "byte-level", "byte fallback", "unigram", "word pieces", "word ends", "replaced", "no decoder",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["tokenizers", "transformers"])
def test_bytes_of_tokens(kind, wrapped):
    tokenizer = build(kind)
    special = {0, 1, 2}
    if wrapped:
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
    tokens = token_bytes(tokenizer)
    assert len(tokens) == (len(tokenizer) if wrapped else tokenizer.get_vocab_size())
    assert all(tokens[i] == b"\0" for i in special)
    special = {i for i, token in enumerate(tokens) if token == b"\0"}  # some trainers add <unk>
    assert len(special) <= 4
    draw = random.Random(0)
    known = [i for i in range(len(tokens)) if i not in special]
    texts = ["the class of a class", "classes ß — “naïve”"][: 1 + kind.startswith("byte")]
    samples = [[known[-1], *draw.choices(known, k=12)] for _ in range(20)]  # first: "of course"
    encoded = [tokenizer.encode(t) if wrapped else tokenizer.encode(t).ids for t in texts]
    for ids in encoded + ([] if kind.startswith("byte") else samples):
        text = tokenizer.decode(ids)
        read = b"".join(tokens[i] for i in ids if i not in special).decode()
        assert read.strip(" ") == text.strip(" ")

    table = tnt.negative_ids_from_phrases(tokenizer, ["class"])
    for ids in encoded:
        done = table.read(torch.tensor([ids]))[1][0]
        counts = [tokenizer.decode(ids[:n]).count("class") for n in range(len(ids) + 1)]
        assert done.tolist() == [b > a for a, b in itertools.pairwise(counts)]
        assert done.any()


def test_bytes_by_decoding():
    """A tokenizer that is no wrapper of ``tokenizers``."""

    class Plain:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 3

        def convert_ids_to_tokens(self, ids):
            return [str(i) for i in ids]

        def decode(self, ids, **_):
            return "".join(["", "it", "er "][i] for i in ids)

    assert token_bytes(Plain()) == [b"\0", b"it", b"er "]


@pytest.mark.parametrize("kind", KINDS)
def test_phrases_of_a_tokenizer_s_decoder(kind):
    """Phrases of several words, in random tokens too, are where the decoded text has them."""
    tokenizer, draw = build(kind), random.Random(0)
    spaced = kind in ("word pieces", "word ends", "no decoder")
    phrases = ["class of", "a class", "s , o" if spaced else "s, o"]
    table = tnt.negative_ids_from_phrases(tokenizer, phrases)
    special = tokenizer.get_added_tokens_decoder()
    known = [
        i for i in range(tokenizer.get_vocab_size()) if not (i in special and special[i].special)
    ]
    text = "a class of class , of a class" if spaced else "a class of class, of a class"
    encoded = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = [[i] for i in known] + [encoded[n : n + 6] for n in range(len(encoded))] * len(known)
    found = 0
    for _ in range(40):
        ids = [*encoded[:1], *(i for piece in draw.choices(pieces, k=12) for i in piece)]
        texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
        # A space behind the last word comes with the next one, or not at all.
        counts = [sum((text + " ").count(phrase) for phrase in phrases) for text in texts]
        done = table.read(torch.tensor([ids]))[1][0].tolist()
        assert done == [b > a for a, b in itertools.pairwise(counts)]
        found += sum(done)
    assert found > 20


def test_decoders_that_cannot_be_verified():
    tokenizers = pytest.importorskip("tokenizers")
    decoders = tokenizers.decoders
    tokenizer = build("unigram")
    for decoder, message in (
        (decoders.CTC(pad_token="<pad>"), "Tokenizer with the decoder CTC: the tokens .* decode to '"),
        (decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), decoders.Replace("ss", "s")]),
         "with the decoder Metaspace, Fuse, Replace: the tokens"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace(tokenizers.Regex("[^x]"), "")]),
         "what a token adds cannot be told"),
    ):  # fmt: skip
        tokenizer.decoder = decoder
        with pytest.raises(ValueError, match=message):
            token_bytes(tokenizer)


def test_rare_punctuation_is_verified_too():
    """It is what decoders clean up, and in a large vocabulary next to never drawn."""
    tokenizers = pytest.importorskip("tokenizers")
    decoders = tokenizers.decoders
    words = [f"▁word{n}" for n in range(5000)]
    vocab = {token: n for n, token in enumerate(["▁", ".", "?", "!", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="."))
    steps = [decoders.Replace("▁", " "), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    assert token_bytes(tokenizer)[:2] == [b" ", b"."]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Replace(" .", ".")])
    with pytest.raises(ValueError, match="with the decoder Replace, Fuse, Replace: the tokens"):
        token_bytes(tokenizer)


def test_a_clean_up_that_changes_words_is_refused():
    transformers = pytest.importorskip("transformers")
    tokenizer = build("word pieces")
    tokenizer.add_tokens(["'", "isn", "t", "don"])
    options = {"clean_up_tokenization_spaces": True, "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    with pytest.raises(ValueError, match="unless its clean_up_tokenization_spaces is False"):
        token_bytes(tokenizer)
    tokenizer.clean_up_tokenization_spaces = False
    assert b" isn" in token_bytes(tokenizer)


def test_slow_tokenizers_are_verified():
    class Parts:
        """Its tokens are bytes, which are no text by themselves."""

        all_special_ids = ()

        def __len__(self) -> int:
            return 256

        def convert_ids_to_tokens(self, ids):
            return [str(i) for i in ids]

        def decode(self, ids, **_):
            return bytes(ids).decode(errors=self.errors)

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

    tokenizer = Parts()
    tokenizer.errors = "replace"
    with pytest.raises(
        ValueError, match="Parts with the decoder none: what a token adds cannot be told"
    ):
        token_bytes(tokenizer)
    tokenizer.errors = "ignore"
    with pytest.raises(ValueError, match="Parts with the decoder none: the tokens"):
        token_bytes(tokenizer)


def test_offsets_of_tokens():
    tokens = [b"a", b"", b"\xc3", b"\x9f!", "—x".encode(), b"\xf0\x9f", b"\x98", b"\x80"]
    assert "".join(["aß!—x", "\U0001f600"]).encode() == b"".join(tokens)
    expected = [[0, 1], [1, 1], [1, 2], [1, 3], [3, 5], [5, 6], [5, 6], [5, 6]]
    assert token_offsets(tokens).tolist() == expected
    assert token_offsets([]).shape == (0, 2)


@pytest.mark.parametrize("wrapped", [False, True], ids=["tokenizers", "transformers"])
def test_vocabularies_with_gaps(wrapped):
    """Ids go beyond the number of tokens: those that do complete phrases too."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {**{letter: n for n, letter in enumerate(alphabet)}, "damn": 400}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if wrapped:
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    table = tnt.negative_ids_from_phrases(tokenizer, ["damn"])
    assert 400 in table.negative_ids[table.start]
    assert table.completed(torch.tensor([[400]])).item()


def test_offsets_where_bytes_are_no_text():
    """They count as decoders count: each wrong byte is a character of its own."""
    tokens = [b"a", b"\x82", b"b", b"\xe2\x82", b"\xac", b"", b"\xe2", b"c"]
    text = b"".join(tokens).decode("utf-8", "replace")
    assert text == "a\ufffdb€\ufffdc"
    found = token_offsets(tokens).tolist()
    assert [text[begin:end] for begin, end in found[:5]] == ["a", "\ufffd", "b", "€", "€"]
    assert found[5][0] == found[5][1]
    assert text[found[7][0] : found[7][1]].endswith("c")
