"""The examples run, and do what they say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from hf_tiny import config, tiny, tokenizer

import tnt_kernels as tnt


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    torch.manual_seed(0)
    return importlib.import_module


@pytest.mark.parametrize("name", ["hf_trainer", "hf_compute_loss_func"])
def test_trainers(example, name, tmp_path):
    before, after = example(name).main(str(tmp_path))
    assert before > 0.25
    assert after < 0.5 * before


def test_plain_loop(example):
    before, after = example("hf_plain_loop").main()
    assert before > 0.25
    assert after < 0.5 * before


def test_three_rounds(example, tmp_path):
    rates = example("hf_refine").main(str(tmp_path))
    assert len(rates) == 4
    assert rates[-1] < 0.5 * rates[0]
    assert {path.name for path in tmp_path.iterdir()} == {"round-1", "round-2", "round-3"}


def test_the_ways_to_take_a_step_agree(example, tmp_path):
    module = example("hf_memory")
    losses = [module.Step(way, 300, str(tmp_path))() for way in module.WAYS]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)


def test_rounds_can_start_from_the_one_before(tmp_path):
    words = tokenizer()
    model = tiny("gpt2", vocab_size=len(words))
    model.config.eos_token_id = model.generation_config.eos_token_id = words.eos_token_id
    marked = []

    def annotate(said):
        marked.append([{**x, "weights": [-1.0] * len(x["completion"])} for x in said])
        return marked[-1]

    options = {"rounds": 2, "reference": "previous", "generation": {"max_new_tokens": 4}}
    rounds = tnt.hf.refine(
        model, words, ["the cat", [7, 8, 9]], annotate, config(tmp_path), **options
    )
    assert [x.examples for x in rounds] == marked
    assert all(1 <= len(x["completion"]) <= 4 for x in marked[0])
    assert marked[0][1]["prompt"] == [7, 8, 9]
    with pytest.raises(ValueError, match="reference is 'last'"):
        tnt.hf.refine(model, words, [], annotate, config(tmp_path), reference="last")


def test_the_steps_whose_overhead_is_measured_agree(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    benchmark = importlib.import_module("benchmarks.hf_overhead")
    text = benchmark.table(benchmark.SIZES[1], seconds=0.0)  # compares the losses
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [
        f"| {title}" for title in benchmark.CONTENDERS.values()
    ]
