"""The demo: what it calls unwanted, what it measures, and a small run from start to end."""

from __future__ import annotations

import csv
import random
import re
import sys

import pytest
import torch

demo = pytest.importorskip("tnt_kernels.demo")
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

PIECES = [
    *b" class|cl|as|ass|s|Class|classes|_class|\xc3\x9fclass|a class a class".split(b"|"),
    *b" of| course|off|iter| it|er|!iterclass|_| \n|\xe2\x80\x9c".split(b"|"),
]
TOKENS = [bytes([byte]) for byte in range(256)] + PIECES


def occurrences(words: list[str], text: bytes) -> int:
    """How many words of a text begin with one of ``words``, said with regular expressions."""
    patterns = [word.encode().replace(b" ", b"[^a-z0-9_]") for word in words]
    beginnings = [rb"(?<![a-z0-9_])(?=%s)" % pattern for pattern in patterns]
    return sum(len(re.findall(beginning, text, re.IGNORECASE)) for beginning in beginnings)


@pytest.mark.parametrize(
    "words", [["class"], ["class", "ass", "a"], ["iter", "IterClass"], ["of course"], ["as a", "s"]]
)
def test_blocklist_agrees_with_decoded_text(words):
    blocklist = demo.Blocklist(words, TOKENS)
    draw = random.Random(0)
    weights = [1] * 256 + [30] * len(PIECES)
    ids = torch.tensor([draw.choices(range(len(TOKENS)), weights, k=12) for _ in range(20)])
    word = b" " + words[0].encode()
    ids[0, : len(word)] = torch.tensor(list(word))  # the first tokens are the bytes
    states, completed = blocklist.read(ids)
    assert completed[0, len(word) - 1]
    for text, text_states, text_completed in zip(ids, states, completed, strict=True):
        for n in range(1, len(text)):
            prefix = b"".join(TOKENS[i] for i in text[:n])
            before = occurrences(words, prefix)
            expected = {i for i, t in enumerate(TOKENS) if occurrences(words, prefix + t) > before}
            row = blocklist.negative_ids[text_states[n - 1]].tolist()
            assert row == sorted(expected, reverse=True) + [-1] * (len(row) - len(expected))
            assert bool(text_completed[n]) == (int(text[n]) in expected)


def test_every_split_of_a_word_is_caught():
    blocklist = demo.Blocklist(["iter"], TOKENS)

    def completed(*tokens: bytes) -> list[bool]:
        return blocklist.read(torch.tensor([[TOKENS.index(t) for t in tokens]]))[1][0].tolist()

    assert completed(b"iter") == [True]  # the beginning of a text is the beginning of a word
    assert completed(b"i", b"t", b"e", b"r", b"s") == [False, False, False, True, False]
    assert completed(b" it", b"er") == [False, True]
    assert completed(b"\xe2", b"\x80", b"\x9c", b"I", b"T", b"er")[-1]
    assert completed(b"_", b"iter", b"a", b"iter") == [False] * 4
    assert completed(b" it", b" it", b"er") == [False, False, True]


def test_unwanted_starts_where_it_is_told():
    blocklist = demo.Blocklist(["iter"], TOKENS)
    ids = torch.tensor([[TOKENS.index(t) for t in (b"iter", b" it", b"er")]] * 2)
    ids[1, 2] = TOKENS.index(b"s")
    assert blocklist.unwanted(ids, 0).tolist() == [True, True]
    assert blocklist.unwanted(ids, 1).tolist() == [True, False]


def test_the_parts_of_the_divergence():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENS), n_positions=8, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5
    )
    model, original = (GPT2LMHeadModel(config).eval() for _ in range(2))
    blocklist = demo.Blocklist(["class", "iter"], TOKENS)
    texts = torch.randint(len(TOKENS), (20, 8))
    left, collateral = demo.divergence(model, original, texts, blocklist)

    negative_ids = blocklist.negative_ids[blocklist.read(texts)[0]]
    removed = torch.zeros(*texts.shape, len(TOKENS) + 1, dtype=torch.bool)
    removed = removed.scatter_(2, negative_ids % (len(TOKENS) + 1), True)[..., :-1]
    with torch.no_grad():
        z, r = model(texts).logits.double(), original(texts).logits.double()
    log_target = r.masked_fill(removed, -torch.inf).log_softmax(-1)
    log_rest = z.masked_fill(removed, -torch.inf).log_softmax(-1)  # p given not S

    def kl(log_p):
        terms = log_target.exp() * (log_target - log_p)
        return terms.masked_fill(removed, 0).sum(-1).mean().item()

    mass = z.softmax(-1).masked_fill(~removed, 0).sum(-1)
    assert left == pytest.approx(-torch.log1p(-mass).mean().item(), rel=1e-5)
    assert collateral == pytest.approx(kl(log_rest), rel=1e-5)
    assert left + collateral == pytest.approx(kl(z.log_softmax(-1)), rel=1e-5)


def test_quick_run(tmp_path, capsys):
    assert demo.main(["--quick", "--out", str(tmp_path / "results")]) == 0
    with open(tmp_path / "results" / "demo.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["original", *(method.name for method in demo.METHODS)]
    original, updated = rows["original"], rows[demo.METHODS[0].name]
    assert float(original["sampled"]) > 0.1
    assert float(updated["sampled"]) < 0.7 * float(original["sampled"])
    assert float(updated["kl"]) < 0.6 * float(original["kl"])
    assert float(original["collateral"]) == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "results" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "TNFF, whole set" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises
    monkeypatch.delitem(sys.modules, "tnt_kernels.demo")
    with pytest.raises(ImportError, match=r"matplotlib.*pip install 'tnt_kernels\[demo\]'"):
        import tnt_kernels.demo  # noqa: F401
