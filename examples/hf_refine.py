"""Three rounds of generating, annotating and updating; the reference stays the first model."""

from __future__ import annotations

import argparse
import re
from typing import Any

from hf_tiny_model import PROMPTS, UNWANTED, load, unwanted_rate

import tnt_kernels as tnt


def annotate(completions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Here a regular expression; in your project a classifier, a person, a second model."""
    spans = [re.finditer("|".join(UNWANTED), example["text"]) for example in completions]
    return [
        {**example, "negative_spans": [match.span() for match in found]}
        for example, found in zip(completions, spans, strict=True)
    ]


def main(output_dir: str) -> list[float]:
    model, tokenizer = load()
    args = tnt.hf.TNTConfig(
        output_dir=output_dir, method="tnff", learning_rate=1e-3, num_train_epochs=8, report_to=[],
        per_device_train_batch_size=32, per_device_eval_batch_size=64, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    generation = {"max_new_tokens": 32}
    rounds = tnt.hf.refine(
        model, tokenizer, PROMPTS * 64, annotate, args, rounds=3, generation=generation
    )
    after = tnt.hf.generate_completions(model, tokenizer, PROMPTS * 64, **generation)
    return [unwanted_rate(x.examples) for x in rounds] + [unwanted_rate(after)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="hf-results")
    rates = main(parser.parse_args().out)
    print("unwanted, round by round:", ", ".join(f"{rate:.0%}" for rate in rates))
