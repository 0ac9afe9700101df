"""The demo: what it measures, and a small run from start to end."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

import tnt_kernels as tnt

demo = pytest.importorskip("tnt_kernels.demo")
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

TOKENS = b"c|l|a|i|t|e|r|cl|as|it|er| | of|class".split(b"|")


def test_the_parts_of_the_divergence():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENS), n_positions=8, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5
    )
    model, original = (GPT2LMHeadModel(config).eval() for _ in range(2))
    blocklist = tnt.NegativePhrases(["cl", "iter"], TOKENS)
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
