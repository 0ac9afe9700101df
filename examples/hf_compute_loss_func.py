"""TNT's loss in a ``transformers.Trainer`` of one's own.

A Trainer calls its ``compute_loss_func`` with outputs, labels and a count alone. Weights and inputs come by a hook on
the model's forward, so they must reach it: ``remove_unused_columns=False``.
"""

from __future__ import annotations

import argparse

from hf_tiny_model import PROMPTS, UNWANTED, load, unwanted_rate
from transformers import Trainer, TrainingArguments

import tnt_kernels as tnt


def main(output_dir: str) -> tuple[float, float]:
    model, tokenizer = load()
    options = {"batch_size": 64, "max_new_tokens": 32}
    said = tnt.hf.generate_completions(model, tokenizer, PROMPTS * 64, **options)
    phrases = tnt.negative_ids_from_phrases(tokenizer, UNWANTED)
    args = TrainingArguments(
        output_dir=output_dir, remove_unused_columns=False, learning_rate=1e-3, num_train_epochs=10,
        per_device_train_batch_size=32, report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    loss = tnt.hf.compute_loss_func(model, method="tnff")
    collator = tnt.hf.TNTDataCollator(tokenizer, model, phrases=phrases)
    Trainer(model, args, collator, said, compute_loss_func=loss).train()
    loss.remove()
    after = tnt.hf.generate_completions(model, tokenizer, PROMPTS * 64, **options)
    return unwanted_rate(said), unwanted_rate(after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="hf-results")
    print("unwanted before and after: {:.0%}, {:.0%}".format(*main(parser.parse_args().out)))
