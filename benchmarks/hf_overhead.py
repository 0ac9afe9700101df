"""What a step of ``TNTTrainer`` costs beyond its loss: against a loop by hand and against a bare ``Trainer``.

``TNTTrainer`` logs statistics of the rows, so one loop asks for these too. All collate the same examples and run the
same two models and the same loss, forward and backward; no optimizer.
``python -m benchmarks.hf_overhead`` prints the tables that ``results/hf_overhead.md`` holds. Needs the extra ``hf``.

It is the processor's time that is measured, of one thread: what a step costs beyond another is its own instructions,
and other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tnt_kernels as tnt


class Size(NamedTuple):
    layers: int
    width: int
    vocabulary: int
    texts: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.texts} × {self.tokens} tokens, {self.layers} layers, H = {self.width}, "
            f"V = {self.vocabulary}"
        )


#: The first is a small training step; in the second there is little else than overhead.
SIZES = (Size(4, 256, 32000, 8, 128), Size(2, 32, 128, 4, 16))
CONTENDERS = {
    "loop": "a loop by hand",
    "stats": "the same, return_stats=True",
    "bare": "Trainer, compute_loss by hand",
    "ours": "TNTTrainer",
}
Example = dict[str, Tensor]


def examples_of(size: Size) -> list[Example]:
    """A quarter of each is prompt; a tenth of the rest is unwanted."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(size.texts):
        length = size.tokens - 2 * i
        ids = torch.randint(size.vocabulary, (length,), generator=generator)
        weights = torch.ones(length)
        weights[::10] = -1.0
        weights[: length // 4] = 0.0
        found.append({"input_ids": ids, "labels": ids, "weights": weights})
    return found


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """What a loop by hand needs of ``TNTDataCollator``."""

    def padded(name: str, value: float) -> Tensor:
        return pad_sequence([x[name] for x in examples], batch_first=True, padding_value=value)

    ids = padded("input_ids", 0)
    mask = padded("labels", -100) != -100
    labels, weights = padded("labels", -100), padded("weights", 0.0)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": F.pad(labels[:, 1:], (0, 1), value=-100),
        "weights": F.pad(weights[:, 1:], (0, 1)),
    }


def loss_by_hand(
    model: Any, original: Any, batch: dict[str, Tensor], count: Tensor, return_stats: bool = False
) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ref_hidden = original.model(**inputs, use_cache=False).last_hidden_state
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    found = tnt.linear_tnt_loss(
        hidden, model.lm_head.weight, ref_hidden, original.lm_head.weight, batch["labels"],
        batch["weights"], normalizer=count, return_stats=return_stats,
    )  # fmt: skip
    return found[0] if return_stats else found


class BareTrainer(Trainer):
    """``Trainer`` around the loop's loss: what a step pays for it without anything of ours."""

    def __init__(self, original: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.original = original

    def _get_num_items_in_batch(self, batches: list[Any], device: Any) -> Tensor:
        return sum((batch["weights"] != 0).sum() for batch in batches)

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **keywords: Any) -> Tensor:
        return loss_by_hand(model, self.original, inputs, keywords["num_items_in_batch"])


class Steps:
    """The contenders at one size, each with a model of its own: name to a step from examples to gradients."""

    def __init__(self, size: Size, folder: str) -> None:
        self.examples = examples_of(size)
        config = LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=2 * size.width,
            num_hidden_layers=size.layers, num_attention_heads=4,
        )  # fmt: skip

        def made(seed: int) -> Any:
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)

        def arguments(kind: Any) -> Any:
            return kind(folder, use_cpu=True, report_to=[], remove_unused_columns=False)

        self.model, self.original = made(0).train(), made(1).eval().requires_grad_(False)
        bare = BareTrainer(self.original, made(0), arguments(TrainingArguments), collate)
        ours = tnt.hf.TNTTrainer(made(0), arguments(tnt.hf.TNTConfig), ref_model=self.original)
        self.trainers = {"bare": bare, "ours": ours}
        for trainer in self.trainers.values():
            trainer.create_optimizer()
        self.steps: dict[str, Callable[[], Tensor]] = {
            "loop": self.loop, "stats": lambda: self.loop(return_stats=True),
            "bare": lambda: self.trained(bare), "ours": lambda: self.trained(ours),
        }  # fmt: skip

    def loop(self, return_stats: bool = False) -> Tensor:
        self.model.zero_grad()
        batch = collate(self.examples)
        count = (batch["weights"] != 0).sum()
        loss = loss_by_hand(self.model, self.original, batch, count, return_stats)
        loss.backward()
        return loss.detach()

    def trained(self, trainer: Trainer) -> Tensor:
        """As ``Trainer`` goes about it; its callbacks, logs and optimizer are not in any of the contenders."""
        trainer.model.zero_grad()
        batches = iter([trainer.data_collator(self.examples)])
        (batch,), count = trainer.get_batch_samples(batches, 1, trainer.args.device)
        return trainer.training_step(trainer.model, batch, count)


def measure(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Processor seconds of each step, in turns, with the first after the others at every turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, end = list(steps), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < 5:
        for name in order:
            start = time.process_time()
            steps[name]()
            times[name].append(time.process_time() - start)
        order.append(order.pop(0))
    return times


def table(size: Size, seconds: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        contenders = Steps(size, folder)
        losses = [step() for step in contenders.steps.values()]
        for loss in losses[1:]:
            torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-6)
        times = measure(contenders.steps, seconds)
    lines = [
        f"| {size} | ms | beyond the loop, ms | of its time |",
        "| --- | ---: | ---: | ---: |",
    ]
    base = times["loop"]
    for name, title in CONTENDERS.items():
        # Of pairs in the same round, so that what slows the machine down for a while slows both.
        extra = statistics.median(x - y for x, y in zip(times[name], base, strict=True))
        median = statistics.median(times[name])
        share = extra / statistics.median(base)
        more = "| | |" if name == "loop" else f"| {extra * 1e3:.2f} | {share:.1%} |"
        lines.append(f"| {title} | {median * 1e3:.2f} {more}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("\n\n".join(table(size, args.seconds) for size in SIZES))


if __name__ == "__main__":
    main()
