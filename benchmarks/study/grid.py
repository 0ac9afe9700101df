"""Every run of the study, and the processes that work through them; each result is kept as soon as it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import tnt_kernels as tnt
from benchmarks.study.finetune import finetune
from benchmarks.study.hallucination import Hallucination
from benchmarks.study.measure import Yardstick, measure, yardstick
from benchmarks.study.task import Scale, Task, Texts
from benchmarks.study.words import Words

TASKS = ("hallucination", "words", "hallucination, spread")
METHODS = tuple(tnt.METHODS)
ALPHAS = (0.04, 0.2, 1.0, 5.0, 25.0)
SEEDS = (0, 1, 2)
TUNING_SEED = 100
#: With sets, every prefix of both tasks is a negative row, so that the positive side of a method never comes into play.
SAME_WITH_SETS = {"tnff": ("tnfr", "tnfll"), "tnrr": ("tnrf", "tnrll")}
FURTHER_METHODS = ("tnff", "tnrf", "ul+ll")  # of the further experiments, at ...
FURTHER_ALPHA = 1.0


def methods(annotation: str, of: Iterable[str] = METHODS) -> tuple[str, ...]:
    """Those of the methods ``of`` that differ under an annotation."""
    if annotation != "set":
        return tuple(of)
    first = {other: method for method, others in SAME_WITH_SETS.items() for other in others}
    return tuple(dict.fromkeys(first.get(method, method) for method in of))


@dataclass(frozen=True)
class Run:
    """One finetuned model. ``method`` "original": the model as it was; "masking": that one, the sets masked."""

    task: str
    method: str
    annotation: str = "token"
    alpha: float = 1.0
    seed: int = 0
    size: str = "base"
    share: float = 1.0  # of the samples
    rounds: int = 1  # of refinement, between which the samples and the steps are divided
    tuning: float | None = None  # the learning rate that this run tries on the validation prompts


def tuning_runs(quick: bool) -> list[Run]:
    """For each task, annotation and method the learning rates; "sequence" and "spread" use those of their relatives."""
    if quick:
        return []
    return [
        Run(task, method, annotation, seed=TUNING_SEED, tuning=rate)
        for task, annotation in product(TASKS[:2], ("token", "set"))
        for method in methods(annotation)
        for rate in make_task(task).learning_rates
    ]


def runs(quick: bool) -> list[Run]:
    if quick:
        few = list(product(("token", "set"), TASKS[:2]))
        found = [Run(t, m, a) for a, t in few for m in methods(a, FURTHER_METHODS)]
        found += [Run("words", "tnff", "sequence"), Run("hallucination", "tnff", rounds=2)]
        return [Run(t, m) for t in TASKS[:2] for m in ("original", "masking")] + found
    found = [Run(task, method) for task in TASKS for method in ("original", "masking")]
    for task, seed in product(TASKS[:2], SEEDS):
        for annotation in ("token", "set"):
            for method, alpha in product(methods(annotation), ALPHAS):
                found.append(Run(task, method, annotation, alpha, seed))
    for seed, method, alpha in product(SEEDS, (*FURTHER_METHODS, "nl+ll"), ALPHAS):
        found.append(Run("words", method, "sequence", alpha, seed))
    for annotation in ("token", "set"):
        of = methods(annotation, (*FURTHER_METHODS, "nl+ll"))
        for seed, method, alpha in product(SEEDS, of, ALPHAS[1:4]):
            found.append(Run(TASKS[2], method, annotation, alpha, seed))
    for task, seed, method in product(TASKS[:2], SEEDS, FURTHER_METHODS):
        base = Run(task, method, "token", FURTHER_ALPHA, seed)
        found += [replace(base, share=share) for share in (0.3, 0.1)]
        found += [replace(base, rounds=3)]
        found += [replace(base, size=size) for size in ("small", "large")]
    found += [Run(task, "original", size=size) for task in TASKS[:2] for size in ("small", "large")]
    return list(dict.fromkeys(found))


# --- One run, in a process that keeps what the next one needs too -----------------------------------


@dataclass(frozen=True)
class Place:
    """Where originals are kept, and whether everything is small."""

    folder: Path
    quick: bool


@lru_cache
def make_task(name: str) -> Task:
    return Words() if name == "words" else Hallucination(spread=name.endswith("spread"))


def _scale(task: str, place: Place) -> Scale:
    return make_task(task).scale(place.quick)


def train_original(task: str, size: str, place: Place) -> None:
    path = _path(task, size, place)
    if not path.exists():
        model = make_task(task).train(size, _scale(task, place))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


def _path(task: str, size: str, place: Place) -> Path:
    return place.folder / f"{task.replace(', ', '-')}-{size}.pt"


@lru_cache(maxsize=2)
def _original(task: str, size: str, place: Place) -> Any:
    return torch.load(_path(task, size, place), weights_only=False)


@lru_cache(maxsize=2)
def _yardstick(task: str, size: str, split: str, place: Place) -> Yardstick:
    return yardstick(make_task(task), _original(task, size, place), split, _scale(task, place))


def _samples(task: Task, model: Any, original: Any, begin: int, end: int, seed: int) -> Texts:
    """Samples of ``model`` for the training prompts from ``begin`` to ``end``."""
    prompts = task.prompts("train", end)[begin:]
    torch.manual_seed(seed)
    return task.texts(prompts, task.generate(model, prompts, sampled=True)).with_reference(original)


@lru_cache(maxsize=1)
def _first_samples(task: str, size: str, seed: int, place: Place) -> Texts:
    model = _original(task, size, place)
    return _samples(make_task(task), model, model, 0, _scale(task, place).samples, seed)


def _joined(parts: list[Texts]) -> Texts:
    fields = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("labels", "active", "unwanted", "sets", "ref_logits")
    }
    inputs = {k: torch.cat([part.inputs[k] for part in parts]) for k in parts[0].inputs}
    return Texts(inputs, **fields)


def work(run: Run, learning_rate: float, place: Place) -> dict[str, Any]:
    """The figures of a run, as a record."""
    started = time.perf_counter()
    task, scale = make_task(run.task), _scale(run.task, place)
    original = _original(run.task, run.size, place)
    split = "test" if run.tuning is None else "validation"
    of = _yardstick(run.task, run.size, split, place)
    if run.method == "original":
        figures = measure(task, original, of)
    elif run.method == "masking":
        masked = task.generate(original, of.prompts, sampled=False, banned=True)
        figures = measure(task, original, of, masked)
    else:
        model, parts = original, []
        for number in range(run.rounds):
            if run.rounds == 1:
                texts = _first_samples(run.task, run.size, run.seed, place)
                texts = texts[: round(run.share * len(texts))]
            else:
                each = scale.samples // run.rounds
                begin = number * each
                parts.append(_samples(task, model, original, begin, begin + each, run.seed))
                texts = _joined(parts)
            model = finetune(
                task,
                model,
                texts,
                scale,
                annotation=run.annotation,
                method=run.method,
                alpha=run.alpha,
                learning_rate=learning_rate,
                steps=scale.steps // run.rounds,
                seed=run.seed,
            )
        figures = measure(task, model, of)
    seconds = time.perf_counter() - started
    record = {"run": asdict(run), "learning_rate": learning_rate, "seconds": seconds}
    return record | {"original_rate": of.rate} | figures


def _start() -> None:
    # Two processes use two cores better than two threads do at these sizes.
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()


# --- All of them ------------------------------------------------------------------------------------


def load(path: Path) -> dict[Run, dict[str, Any]]:
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {Run(**record.pop("run")): record for record in records}


def tuned(done: dict[Run, dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """The learning rate of each task, annotation and method.

    The one with the highest harmonic mean of the reduction of the unwanted rate and BLEU, at alpha = 1; where none
    reduces anything, the lowest KL to the exact update decides.
    """
    scores: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    for run, record in done.items():
        if run.tuning is not None:
            reduction = max(1 - record["rate"] / record["original_rate"], 0.0)
            both = reduction + record["bleu"]
            harmonic = 2 * reduction * record["bleu"] / both if both else 0.0
            kl = record["left"] + record["collateral"]
            key = (run.task, run.annotation, run.method)
            scores.setdefault(key, []).append((harmonic, -kl, run.tuning))
    return {key: max(tries)[2] for key, tries in scores.items()}


def learning_rate(run: Run, rates: dict[tuple[str, str, str], float], quick: bool) -> float:
    if run.method in ("original", "masking"):
        return 0.0
    if quick:
        return make_task(run.task).learning_rates[1]
    if run.tuning is not None:
        return run.tuning
    annotation = "token" if run.annotation == "sequence" else run.annotation
    return rates[run.task.partition(",")[0], annotation, run.method]


def run_all(path: Path, place: Place, workers: int) -> None:
    """Works through what ``path``, a file of records, does not have yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start) as pool:
        later = runs(place.quick)
        originals = list(dict.fromkeys((run.task, run.size) for run in later))
        waiting = [pool.submit(train_original, *original, place) for original in originals]
        for future in tqdm(as_completed(waiting), "originals", len(waiting)):
            future.result()
        for name, stage in (("tuning", tuning_runs(place.quick)), ("runs", later)):
            done = load(path)
            rates = tuned(done)
            todo = sorted((run for run in stage if run not in done), key=_order)
            waiting = [
                pool.submit(work, run, learning_rate(run, rates, place.quick), place)
                for run in todo
            ]
            with path.open("a") as file:
                bar = tqdm(as_completed(waiting), name, len(stage), initial=len(stage) - len(todo))
                for future in bar:
                    file.write(json.dumps(future.result()) + "\n")
                    file.flush()


def _order(run: Run) -> tuple[Any, ...]:
    """Neighbours share what a process keeps."""
    first = run.method not in ("original", "masking")
    return (run.task, run.size, run.rounds, run.seed, first, run.share, run.annotation, run.method)
