"""Numbers in the documents are those that code derives or that results hold."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="no benchmarks next to the tests"
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_page_on_scale_is_what_the_formulas_say() -> None:
    from benchmarks import scale

    page = scale.PAGE.read_text()
    assert scale.filled(page) == page
    assert scale.filled(page.replace("| 128256 | 8 | 157 |", "| 128256 | 8 | 158 |")) == page


def test_the_formula_of_one_device_is_the_floor_that_is_measured_against() -> None:
    from benchmarks.scale import memory_traffic
    from tnt_kernels.bench.problem import Size
    from tnt_kernels.bench.steps import floor_bytes

    size = Size(512, 128256, "bfloat16")
    assert floor_bytes(size, "tnff", 1.0, True) == pytest.approx(
        512 * memory_traffic(128256, 1), rel=1e-3
    )


@pytest.mark.parametrize("name", ["hf_memory", "hf_overhead"])
def test_readme_shows_the_results_of_the_trainer(name: str) -> None:
    result = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text().strip()
    assert result in (ROOT / "README.md").read_text()


def test_readme_shows_the_demo_s_results() -> None:
    readme = (ROOT / "README.md").read_text().replace("**", "")
    with (ROOT / "benchmarks" / "results" / "demo.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            shares = [
                f"{float(row[name]):.1%}".replace("%", " %") for name in ("sampled", "greedy")
            ]
            nats = [f"{float(row[name]):.4f}" for name in ("kl", "left", "collateral")]
            same = f"{float(row['identical']):.1%}".replace("%", " %") if row["identical"] else ""
            cells = [row["method"], *shares, *nats, same]
            assert " ".join(f"| {' | '.join(cells)} |".split()) in readme


def test_readme_s_python_runs() -> None:
    """Block after block, as one program; the training loop with models of its kind. That of Hugging Face has tests of
    its own: it loads a model by name."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    mine = [block for block in blocks if "from_pretrained" not in block]
    assert len(mine) == len(blocks) - 1 == 3
    embedding = torch.nn.Embedding(50, 50)

    def model(ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=embedding(ids) * 2)

    names: dict[str, Any] = {
        "model": model,
        "original": model,
        "optimizer": torch.optim.SGD(embedding.parameters(), 1.0),
        "loader": [{"input_ids": torch.randint(50, (2, 6)), "weights": -torch.ones(2, 6)}],
    }
    before = embedding.weight.detach().clone()
    for block in mine:
        exec(compile(block, "README.md", "exec"), names)
    assert not torch.equal(embedding.weight, before)
    assert names["loss"].isfinite()
    assert not torch.equal(names["lm_head"].weight, names["original_head"])
