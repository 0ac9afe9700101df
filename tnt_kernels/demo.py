"""The library's main job from start to end, on real text, in a few minutes on two CPU cores.

``python -m tnt_kernels demo`` trains a small GPT on the documentation that comes with Python, lists
words that it must no longer use, and updates it in four ways on its own samples. What to copy into
your own project is :func:`finetune`, the training loop, with ``tnt.negative_ids_from_phrases``, which
says what tokens are unwanted at each prefix. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tnt_kernels as tnt

try:
    import pandas as pd
    from matplotlib.figure import Figure
    from tokenizers import ByteLevelBPETokenizer
    from tqdm import tqdm, trange
    from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup
    from transformers.utils import logging as transformers_logging
except ModuleNotFoundError as error:
    message = f"the demo needs {error.name}: pip install 'tnt_kernels[demo]'"
    raise ModuleNotFoundError(message, name=error.name) from error

#: A text is unwanted when one of its words begins with one of these, in lower or upper case:
#: "iter" stands for "Iterable" and "iterators" too.
UNWANTED = "argument dict exception hash instance iter namespace parameter program tuple".split()


class Method(NamedTuple):
    name: str
    method: str
    whole_set: bool  # all the unwanted tokens of a position are given, not the sampled one alone
    learning_rate: float


METHODS = (
    Method("TNFF, whole set", "tnff", True, 3e-4),
    Method("TNFF, sampled token", "tnff", False, 3e-4),
    Method("TNRF, sampled token", "tnrf", False, 1e-4),
    Method("UL+LL, sampled token", "ul+ll", False, 3e-5),
)


@dataclass(frozen=True)
class Scale:
    """How much of everything; lengths in tokens."""

    vocabulary: int = 1024
    layers: int = 2
    hidden: int = 192
    batch: int = 16
    prompt: int = 32
    length: int = 80
    train_steps: int = 400
    train_samples: int = 2048
    finetune_steps: int = 250
    test_prompts: int = 1024  # at most: the held-out text has some 340 that do not overlap


QUICK = Scale(512, 2, 96, train_steps=120, train_samples=256, finetune_steps=40, test_prompts=64)


# --- The original model ---------------------------------------------------------------------------


def read_prose(seed: int) -> tuple[str, str]:
    """The prose of Python's language reference: a text to train on, a held-out text."""
    from pydoc_data.topics import topics

    blocks = (" ".join(block.split()) for text in topics.values() for block in text.split("\n\n"))
    # Topics quote each other: a paragraph counts once, so that none is on both sides of the split.
    prose = [
        block
        for block in dict.fromkeys(blocks)
        if len(re.findall(r"[A-Za-z ]", block)) > 0.8 * len(block) > 48 and "::=" not in block
    ]
    random.Random(seed).shuffle(prose)
    held_out = len(prose) // 8
    return "\n".join(prose[held_out:]), "\n".join(prose[:held_out])


def train_original(ids: Tensor, scale: Scale) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=scale.vocabulary,
        n_positions=scale.length,
        n_embd=scale.hidden,
        n_layer=scale.layers,
        n_head=4,
        initializer_range=0.06,  # GPT-2's 0.02 suits wider models
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimizer, scale.train_steps // 7, scale.train_steps)
    windows = ids.unfold(0, scale.length, 1)
    progress = trange(scale.train_steps, desc="training the original")
    for _ in progress:
        batch = windows[torch.randint(len(windows), (scale.batch,))]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(nats=f"{loss.item():.2f}")
    return model.eval()


def sample(model: GPT2LMHeadModel, prompts: Tensor, length: int, *, greedy: bool) -> Tensor:
    """Prompts (B, P) with their continuations, (B, length)."""
    # top_k=0: transformers would sample from the 50 likeliest tokens, not from the model.
    options: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
    parts = [
        model.generate(part, attention_mask=torch.ones_like(part), max_length=length, **options)
        for part in tqdm(prompts.split(128), desc="greedy" if greedy else "sampling", leave=False)
    ]
    return torch.cat(parts)


# --- The update -----------------------------------------------------------------------------------


def finetune(
    original: GPT2LMHeadModel,
    samples: Tensor,
    blocklist: tnt.NegativePhrases,
    method: Method,
    scale: Scale,
) -> GPT2LMHeadModel:
    """Trains a copy of the original on the original's own samples, (B, T) token ids."""
    model = copy.deepcopy(original)
    optimizer = torch.optim.Adam(model.parameters(), lr=method.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, scale.finetune_steps)

    states, completed = blocklist.read(samples)
    # Row t of the logits predicts token t + 1. Labels and weights are shifted to match, not the
    # logits: slicing those would copy them. Prompts were not sampled, and the last row has no label.
    labels = samples.roll(-1, dims=1)
    weights = torch.ones(samples.shape)
    weights[:, : scale.prompt - 1] = weights[:, -1] = 0
    if not method.whole_set:
        weights[completed.roll(-1, dims=1) & (weights > 0)] = -1

    progress = trange(scale.finetune_steps, desc=method.name)
    for _ in progress:
        rows = torch.randint(len(samples), (scale.batch,))
        with torch.no_grad():
            ref_logits = original(samples[rows]).logits
        loss = tnt.tnt_loss(
            model(samples[rows]).logits,
            ref_logits,
            labels[rows],
            weights[rows],
            method=method.method,
            negative_ids=blocklist.negative_ids[states[rows]] if method.whole_set else None,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return model


# --- How well it went -----------------------------------------------------------------------------


def kl_parts(rows: tnt.RowStats) -> tuple[Tensor, Tensor]:
    """KL(q*‖p) of each row, in nats, as -log(1 - p(S)), what is left of S, and KL(q* ‖ p given not S), collateral."""
    left = -torch.log1p(-rows.negative_mass)
    return left, (rows.kl - left).clamp(min=0)  # below 0 by rounding alone


@torch.no_grad()
def divergence(
    model: GPT2LMHeadModel, original: GPT2LMHeadModel, texts: Tensor, blocklist: tnt.NegativePhrases
) -> tuple[float, float]:
    """The mean of ``kl_parts`` at the prefixes of ``texts``, (B, T) token ids.

    q* is the exact token-level update: the original without any of the prefix's unwanted tokens S.
    """
    _, rows = tnt.tnt_loss(
        model(texts).logits,
        original(texts).logits,
        texts.roll(-1, dims=1),  # not read: no row pushes its label down
        negative_ids=blocklist.negative_ids[blocklist.read(texts)[0]],
        reduction="none",
        return_stats=True,
    )
    left, collateral = kl_parts(rows)
    return left.mean().item(), collateral.mean().item()


def evaluate(
    model: GPT2LMHeadModel,
    original: GPT2LMHeadModel,
    held_out: Tensor,
    blocklist: tnt.NegativePhrases,
    scale: Scale,
    seed: int,
) -> tuple[dict[str, float], Tensor]:
    """A row of the table, from a held-out text, and greedy continuations of the text's pieces."""
    torch.manual_seed(seed)
    prompts = held_out.unfold(0, scale.prompt, scale.prompt)[: scale.test_prompts]
    sampled = sample(model, prompts.repeat(3, 1), scale.length, greedy=False)
    greedy = sample(model, prompts, scale.length, greedy=True)
    texts = held_out.unfold(0, scale.length, scale.length)
    left, collateral = divergence(model, original, texts, blocklist)
    figures = {
        "sampled": blocklist.completed(sampled, scale.prompt).float().mean().item(),
        "greedy": blocklist.completed(greedy, scale.prompt).float().mean().item(),
        "kl": left + collateral,
        "left": left,
        "collateral": collateral,
    }
    return figures, greedy


EXPLANATION = """

sampled, greedy  share of held-out continuations that have an unwanted word
kl               to the exact token-level update, mean over held-out prefixes, nats = the next two:
left             -log(1 - p(S)), what is left of the unwanted tokens
collateral       KL(q* ‖ p given not S), change among the other tokens
identical        share of the original's clean greedy continuations that are still the same
"""


def plot(table: pd.DataFrame, path: Path) -> None:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    rates, kl = figure.subplots(1, 2, sharey=True)
    table = table.iloc[::-1]  # the first row on top
    (100 * table[["greedy", "sampled"]]).plot.barh(ax=rates)
    rates.set(xlabel="continuations with an unwanted word, %", ylabel="")
    table[["left", "collateral"]].plot.barh(ax=kl, stacked=True)
    kl.set(xlabel="KL to the exact update, nats")
    kl.legend(["left of the unwanted tokens", "collateral"])
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo with the command-line arguments ``argv`` and returns the exit status."""
    parser = argparse.ArgumentParser(prog="tnt-kernels demo", description="Update a small GPT.")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="where results go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a rough version in half a minute")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    scale = QUICK if args.quick else Scale()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(args.seed)

    train_text, held_out_text = read_prose(args.seed)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([train_text], vocab_size=scale.vocabulary, show_progress=False)
    train_ids, held_out_ids = (
        torch.tensor(tokenizer.encode(text).ids) for text in (train_text, held_out_text)
    )
    print(f"{len(train_ids)} tokens to train on, {len(held_out_ids)} held out")
    original = train_original(train_ids, scale)

    print(f"unwanted: words that begin with {', '.join(UNWANTED)}")
    blocklist = tnt.negative_ids_from_phrases(
        tokenizer, UNWANTED, ignore_case=True, word_start=True
    )
    starts = torch.randint(len(train_ids) - scale.prompt, (scale.train_samples,))
    prompts = train_ids[starts[:, None] + torch.arange(scale.prompt)]
    samples = sample(original, prompts, scale.length, greedy=False)

    first, first_greedy = evaluate(original, original, held_out_ids, blocklist, scale, args.seed)
    clean = ~blocklist.completed(first_greedy, scale.prompt)
    figures, greedy = {"original": first}, {"original": first_greedy}
    for method in METHODS:
        torch.manual_seed(args.seed)  # the same batches for every method
        model = finetune(original, samples, blocklist, method, scale)
        row, texts = evaluate(model, original, held_out_ids, blocklist, scale, args.seed)
        same = (texts == first_greedy).all(dim=1)[clean].float().mean().item()
        figures[method.name] = {"learning_rate": method.learning_rate, **row, "identical": same}
        greedy[method.name] = texts

    for i in (~clean).nonzero().flatten().tolist()[:2]:
        print("\nprompt:", repr(tokenizer.decode(first_greedy[i, : scale.prompt].tolist())))
        for name in ("original", METHODS[0].name):
            print(f"{name}:", repr(tokenizer.decode(greedy[name][i, scale.prompt :].tolist())))
    table = pd.DataFrame.from_dict(figures, orient="index", columns=list(figures[METHODS[0].name]))
    shares = dict.fromkeys(("sampled", "greedy", "identical"), "{:.1%}".format)
    nats = dict.fromkeys(("kl", "left", "collateral"), "{:.4f}".format)
    rates = {"learning_rate": "{:.0e}".format}
    print("\n" + table.to_string(formatters=shares | nats | rates, na_rep="") + EXPLANATION)

    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "demo.csv", index_label="method", float_format="%.6g")
    plot(table, args.out / "demo.png")
    print(f"Written to {args.out}: demo.csv, demo.png.")
    print(f"{time.perf_counter() - started:.0f} s with {torch.get_num_threads()} threads.")
    return 0
