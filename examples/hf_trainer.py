"""A model unlearns words with ``TNTTrainer``: sample from it, mark the words' characters, train."""

from __future__ import annotations

import argparse
import re

from hf_tiny_model import PROMPTS, UNWANTED, load, unwanted_rate

import tnt_kernels as tnt


def main(output_dir: str) -> tuple[float, float]:
    model, tokenizer = load()  # AutoModelForCausalLM.from_pretrained(...), AutoTokenizer...
    said = tnt.hf.generate_completions(
        model, tokenizer, PROMPTS * 64, batch_size=64, max_new_tokens=32
    )
    before = unwanted_rate(said)
    for example in said:
        found = re.finditer("|".join(UNWANTED), example["text"])
        example["negative_spans"] = [match.span() for match in found]

    args = tnt.hf.TNTConfig(
        output_dir=output_dir, method="tnff", learning_rate=1e-3, num_train_epochs=10,
        per_device_train_batch_size=16, gradient_accumulation_steps=2, report_to=[], use_cpu=True,
    )  # fmt: skip
    trainer = tnt.hf.TNTTrainer(model, args, train_dataset=said, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    said = tnt.hf.generate_completions(
        model, tokenizer, PROMPTS * 64, batch_size=64, max_new_tokens=32
    )
    return before, unwanted_rate(said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="hf-results")
    print("unwanted before and after: {:.0%}, {:.0%}".format(*main(parser.parse_args().out)))
