"""What one training step takes in memory: PyTorch as people write it, ``TNTTrainer`` with logits, and without."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tnt_kernels as tnt

WAYS = {
    "naive": "log_softmax and KL in PyTorch",
    "logits": "TNTTrainer, fused_linear=False",
    "fused": "TNTTrainer",
}
TEXTS, TOKENS = 4, 256


def naive_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    removed = F.one_hot(labels, logits.size(-1)).bool() & (weights < 0)[..., None]
    log_q = log_q.masked_fill(removed, -torch.inf).log_softmax(-1)
    kl = torch.where(removed, 0.0, log_q.exp() * (log_q - log_p)).sum(-1)
    return (kl * (weights != 0)).sum() / (weights != 0).sum()


class Step:
    """A model, its reference and a batch; a call makes loss and gradients."""

    def __init__(self, way: str, vocabulary: int, folder: str) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, **sizes)
        original, model = (LlamaForCausalLM(config) for _ in range(2))
        args = tnt.hf.TNTConfig(
            folder, use_cpu=True, report_to=[], fused_linear=way == "fused", max_steps=1
        )
        self.way, self.trainer = way, tnt.hf.TNTTrainer(model, args, ref_model=original)
        ids = torch.randint(vocabulary, (TEXTS, TOKENS))
        weights = torch.ones(ids.shape)
        weights[:, ::10] = -1.0
        weights[:, : TOKENS // 4] = 0.0  # prompts
        self.batch = {"input_ids": ids, "labels": ids, "weights": weights}

    def __call__(self) -> float:
        trainer, batch = self.trainer, dict(self.batch)
        if self.way == "naive":
            inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
            labels, weights = batch["labels"].roll(-1, 1), batch["weights"].roll(-1, 1)
            weights[:, -1] = 0.0
            with torch.no_grad():
                ref_logits = trainer.ref_model(**inputs).logits
            loss = naive_loss(trainer.model(**inputs).logits, ref_logits, labels, weights)
        else:
            count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
        return loss.item()


def peak(step: Step) -> int:
    """Bytes that a process's first step needs beyond the two models: resident memory, read every 2 ms. Linux.

    The first, as later ones find memory that the allocator has kept.
    """

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    most = before = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return most - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    args = parser.parse_args()
    if args.way:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{peak(Step(args.way, args.vocabulary, folder)) / 2**20:.0f}")
        return
    print(f"| {TEXTS * TOKENS} rows, V = {args.vocabulary}, float32 | MiB |\n| --- | ---: |")
    for way, name in WAYS.items():
        command = [sys.executable, __file__, "--way", way, "--vocabulary", str(args.vocabulary)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"| {name} | {output.split()[-1]} |")


if __name__ == "__main__":
    main()
