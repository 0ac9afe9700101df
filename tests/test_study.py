"""The study of the benchmarks: its tasks and measures, a quick run from start to end, and what its README shows."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import tnt_kernels as tnt

pytest.importorskip("sacrebleu")
grid = pytest.importorskip("benchmarks.study.grid")
from benchmarks.study import __main__ as command  # noqa: E402
from benchmarks.study import finetune, measure, report, task  # noqa: E402
from benchmarks.study.hallucination import Hallucination  # noqa: E402
from benchmarks.study.words import Words  # noqa: E402


@pytest.fixture(scope="module", params=["hallucination", "words"])
def toy(request: pytest.FixtureRequest):
    """A task, a barely trained original, prompts, samples of it, and their texts with the reference."""
    which = Words() if request.param == "words" else Hallucination(spread=False)
    torch.manual_seed(0)
    model = which.train("small", task.Scale(8, 0, 0, 0, 0, 0))
    prompts = which.prompts("train", 24)
    said = which.generate(model, prompts, sampled=True)
    return which, model, prompts, said, which.texts(prompts, said).with_reference(model)


def test_rows_predict_their_labels(toy):
    which, _, _, said, texts = toy
    labels = texts.labels[texts.active]
    assert torch.equal(labels, said[said != 0] if which.name != "words" else said.flatten())
    # What the model said is likelier in its own row than in a neighbour's, were rows and labels shifted.
    right = texts.ref_logits.log_softmax(-1).gather(2, texts.labels[..., None])[..., 0]
    assert right[texts.active].isfinite().all()


def test_unwanted_labels_are_in_their_sets(toy):
    which, _, _, _, texts = toy
    inside = (which.negative_ids(texts) == texts.labels[..., None]).any(-1)
    assert torch.equal(inside & texts.active, texts.unwanted & texts.active)
    assert texts.unwanted.any()


def test_masked_decoding_is_clean(toy):
    which, model, prompts, _, _ = toy
    said = which.generate(model, prompts, sampled=True, banned=True)
    assert not which.texts(prompts, said).unwanted.any()


def test_the_exact_update_has_no_divergence(toy):
    which, model, _, _, texts = toy
    masked = task.Banned(lambda ids: ids)(
        which.negative_ids(texts).expand(*texts.labels.shape, -1).flatten(0, 1),
        texts.ref_logits.flatten(0, 1),
    ).view_as(texts.ref_logits)

    class Exact(torch.nn.Module):
        def forward(self, **inputs):
            return type("Output", (), {"logits": masked})

    left, collateral = measure.divergence(which, Exact(), texts)
    assert left == pytest.approx(0, abs=1e-6)
    assert collateral == pytest.approx(0, abs=1e-6)
    before, nothing = measure.divergence(which, model, texts)
    assert before > 0
    assert nothing == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["ul+ll", "nl+ll"])
def test_baselines_with_sets_have_both_terms(toy, method):
    which, _, _, _, texts = toy
    torch.manual_seed(1)
    logits = torch.randn_like(texts.ref_logits, requires_grad=True)
    got = finetune.batch_loss(which, logits, texts, "set", method, 3.0)
    log_p = logits.log_softmax(-1)
    ids = which.negative_ids(texts).expand(*texts.labels.shape, -1)
    inside = torch.zeros(*texts.labels.shape, logits.size(-1) + 1, dtype=torch.bool)
    inside = inside.scatter_(2, ids % inside.size(-1), True)[..., :-1]
    if method == "ul+ll":
        push = -torch.log1p(-(log_p.exp() * inside).sum(-1))
    else:
        push = (log_p * inside).sum(-1)
    push = push * inside.any(-1)
    keep = -log_p.gather(2, texts.labels[..., None])[..., 0] * ~texts.unwanted
    want = ((3 * push + keep) * texts.active).sum() / texts.active.sum()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_methods_that_are_the_same_with_sets(toy):
    which, _, _, _, texts = toy
    assert (which.negative_ids(texts) >= 0).any(dim=2).all()
    for method, others in grid.SAME_WITH_SETS.items():
        losses = [
            finetune.batch_loss(which, texts.ref_logits + 0.1, texts, "set", m, 0.2)
            for m in (method, *others)
        ]
        assert len({*map(float, losses)}) == 1
    assert grid.methods("set") == ("tnff", "tnrr", "nl+ll", "ul+ll")
    assert grid.methods("token") == tuple(tnt.METHODS)


def test_weights_of_the_annotations(toy):
    _, _, _, _, texts = toy
    token, whole = (finetune.row_weights(texts, a) for a in ("token", "sequence"))
    assert torch.equal(token == -1, texts.unwanted & texts.active)
    marked = texts.unwanted.any(dim=1)
    assert (whole[marked] == -texts.active[marked].float()).all()
    assert (whole[~marked] == texts.active[~marked].float()).all()


def test_disfluencies_of_summaries():
    which = Hallucination(spread=False)
    said = [
        "in year-3 name-1 painted place-2 .",
        "in unknown name-1 painted place-2 .",
        "name-1 painted in year-3 .",
        "name-1 painted name-1 in year-3 .",
    ]
    ids = which.encode(said, 10)
    assert which.words(ids, ids) == said
    assert which.disfluencies(ids, ids).tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]


def test_matched_reduction_is_interpolated():
    curve = pd.DataFrame(
        {"alpha": [4.0, 1.0], "reduction": [0.8, 0.4], "bleu": [0.5, 0.9], "identical": [0.2, 0.6]}
    )
    assert report.at_reduction(curve, 0.2, "bleu") == pytest.approx((0.95, 0.95, True))
    assert report.at_reduction(curve, 0.6, "identical") == pytest.approx((0.7, 0.4, False))
    assert report.at_reduction(curve, 0.9, "bleu") is None


def test_seeds_without_overlap_win():
    a, b, short = (pd.Series(x) for x in ([0.8, 0.9], [0.5, 0.7], [0.95, float("nan")]))
    assert report._compare(a, b, higher=True) == "won"
    assert report._compare(a, b, higher=False) == "lost"
    assert report._compare(b, pd.Series([0.6, 0.9]), higher=True) == "open"
    assert report._compare(short, b, higher=True) == "lost"


def test_the_best_learning_rate_is_chosen():
    run = grid.Run("words", "tnff", tuning=1e-4)
    other = grid.Run("words", "tnff", tuning=1e-3)
    figures = {"original_rate": 0.4, "left": 0.1, "collateral": 0.0}
    done = {run: figures | {"rate": 0.1, "bleu": 0.6}, other: figures | {"rate": 0.0, "bleu": 0.1}}
    assert grid.tuned(done) == {("words", "token", "tnff"): 1e-4}
    idle = {key: figures | {"rate": 0.4, "bleu": 1.0, "left": key.tuning} for key in done}
    assert grid.tuned(idle) == {("words", "token", "tnff"): 1e-4}


def test_a_quick_run(tmp_path, capfd):
    arguments = ["--quick", "--out", str(tmp_path), "--originals", str(tmp_path / "o")]
    command.main(arguments)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == len(grid.runs(quick=True))
    for line in lines:
        record = json.loads(line)
        if record["run"]["method"] == "original":
            assert record["bleu"] == pytest.approx(1)
            assert record["collateral"] == pytest.approx(0, abs=1e-6)
        if record["run"]["method"] == "masking":
            assert record["rate"] == 0
    assert {p.name for p in tmp_path.glob("*.svg")} == {"kl.svg", "trade_off.svg"}

    # What is there is not run again.
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    command.main([*arguments, "--workers", "1"])
    again = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["run"] == json.loads(lines[-1])["run"]


def test_the_grid_has_what_the_readme_says():
    found = grid.runs(quick=False)
    for which in grid.TASKS[:2]:
        for annotation in ("token", "set"):
            mine = {
                (r.method, r.alpha, r.seed)
                for r in found
                if (r.task, r.annotation, r.size, r.share, r.rounds)
                == (which, annotation, "base", 1, 1)
                and r.method in tnt.METHODS
            }
            assert len(mine) == len(grid.methods(annotation)) * len(grid.ALPHAS) * len(grid.SEEDS)


def test_the_readme_shows_the_results():
    path = Path(command.FOLDER) / "runs.jsonl"
    assert set(grid.load(path)) >= set(grid.runs(quick=False))
    for file, text in report.pages(path).items():
        assert file.read_text() == text
