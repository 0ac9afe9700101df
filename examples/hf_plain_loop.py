"""The same without a trainer: a plain loop with the collator and ``tnt_loss``.

Here every position knows all tokens that would complete an unwanted word (``phrases``), not the sampled one alone.
"""

from __future__ import annotations

import copy

import torch
from hf_tiny_model import PROMPTS, UNWANTED, load, unwanted_rate

import tnt_kernels as tnt


def main() -> tuple[float, float]:
    model, tokenizer = load()
    options = {"batch_size": 64, "max_new_tokens": 32}
    said = tnt.hf.generate_completions(model, tokenizer, PROMPTS * 64, **options)
    before = unwanted_rate(said)

    phrases = tnt.negative_ids_from_phrases(tokenizer, UNWANTED)
    collate = tnt.hf.TNTDataCollator(tokenizer, model, phrases=phrases)
    original = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in torch.utils.data.DataLoader(said * 10, 32, shuffle=True, collate_fn=collate):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        # Row t of the logits predicts token t + 1: shift labels and negative ids, never the logits.
        labels, negative_ids = batch["labels"].roll(-1, 1), batch["negative_ids"].roll(-1, 1)
        labels[:, -1] = -100
        with torch.no_grad():
            ref_logits = original(**inputs).logits
        logits = model(**inputs).logits
        tnt.tnt_loss(logits, ref_logits, labels, negative_ids=negative_ids, inplace=True).backward()
        optimizer.step()
        optimizer.zero_grad()

    said = tnt.hf.generate_completions(model, tokenizer, PROMPTS * 64, **options)
    return before, unwanted_rate(said)


if __name__ == "__main__":
    print("unwanted before and after: {:.0%}, {:.0%}".format(*main()))
