"""Tiny models, a tokenizer and annotated data for the tests of ``tnt_kernels.hf``; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers as hf

import tnt_kernels as tnt

VOCAB = 100
UNWANTED = torch.arange(3, VOCAB, 7)
KINDS = ("gpt2", "llama", "gemma2", "t5")
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
_SEQ2SEQ = {"vocab_size": VOCAB, "d_model": 32, "decoder_start_token_id": 0}


def tiny(kind: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    if kind == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**{**sizes, **ids, **options}))
    if kind == "t5":
        sizes = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return hf.T5ForConditionalGeneration(hf.T5Config(**{**_SEQ2SEQ, **sizes, **options}))
    if kind == "bart":
        parts = {f"{side}_{name}": n for side in ("encoder", "decoder")
                 for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        return hf.BartForConditionalGeneration(hf.BartConfig(**{**_SEQ2SEQ, **parts, **options}))
    names = {"llama": "Llama", "gemma2": "Gemma2", "cohere": "Cohere", "granite": "Granite"}
    config = getattr(hf, f"{names[kind]}Config")(**{**_DECODER, **options})
    return getattr(hf, f"{names[kind]}ForCausalLM")(config)


def annotated(
    n: int, seed: int = 1, encoder_decoder: bool = False, negative_ids: bool = False
) -> list[dict[str, Tensor]]:
    """Examples of uneven lengths, with prompts, unwanted tokens and left-out ones."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(n):
        length = int(torch.randint(4, 14, (1,), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        weights = torch.where(ids % 5 == 0, -1.0, 1.0)
        weights[ids % 11 == 0] = 0.0
        if not encoder_decoder:
            weights[: length // 3] = 0.0
        examples.append({"input_ids": ids, "labels": ids.clone(), "weights": weights})
        if negative_ids and length % 2:
            draw = torch.randint(-VOCAB, VOCAB, (length, 3), generator=generator)
            examples[-1]["negative_ids"] = draw.clamp(min=-1)
        if encoder_decoder:
            examples[-1]["input_ids"] = ids.flip(0)[: length - 1]
    return examples


def config(folder: Path | str, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 1,
        "per_device_train_batch_size": 8, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
    }  # fmt: skip
    return tnt.hf.TNTConfig(**{**defaults, **options})


def trained(model: nn.Module, args: Any, examples: Any, **keywords: Any) -> Any:
    trainer = tnt.hf.TNTTrainer(model, args, train_dataset=examples, **keywords)
    trainer.train()
    return trainer


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def assert_same(
    a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor], rtol: float
) -> None:
    """Whether two updates of ``start`` are the same, relative to their size; but for those that are rounding alone, as
    of attention's biases on keys, which change no attention."""
    sizes = {name: (a[name] - x).norm() for name, x in start.items()}
    least = 1e-4 * max(sizes.values())
    for name, size in sizes.items():
        assert size > 0 or torch.equal(a[name], b[name]), name
        assert (a[name] - b[name]).norm() <= rtol * max(size, least), name


def tokenizer(**options: Any) -> Any:
    """Byte-level BPE with merges of a few words."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|bot|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["the cat sat on the mat and the dog sat too"] * 3, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=special[3:], **options,
    )  # fmt: skip
