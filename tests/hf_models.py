"""Tiny float64 models of nine architectures, and adapters on them, for the matrix; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB = 100
IMAGE = 99  #: the id that stands for a patch of an image
PATCHES = 4  #: of one image, hence so many ids IMAGE in its text
PIXELS = (3, 4, 4)
VIRTUAL = 3  #: tokens of prefix and prompt tuning
KINDS = ("gpt2", "llama", "gemma3", "qwen3", "falcon", "mixtral", "t5", "mbart", "llava")
ENCODER_DECODERS = ("t5", "mbart")
AUXILIARY = 0.5  #: coefficient of Mixtral's load balancing

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {
    **_IDS, "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.3, "attention_dropout": 0.1, "tie_word_embeddings": False,
}  # fmt: skip


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(**_IDS, **sizes, vocab_size=VOCAB, initializer_range=0.3)
    )


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER))


def _gemma3() -> nn.Module:
    """Tied, with a window shorter than the texts, and a softcap behind the head."""
    options = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    options |= {"tie_word_embeddings": True, "final_logit_softcapping": 5.0}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**{**_DECODER, **options}))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER))


def _falcon() -> nn.Module:
    options = {"hidden_dropout": 0.1, "tie_word_embeddings": True, "bias": True, "alibi": False}
    taken = {k: x for k, x in _DECODER.items() if k not in ("head_dim", "num_key_value_heads")}
    return hf.FalconForCausalLM(hf.FalconConfig(**{**taken, **options}))


def _mixtral() -> nn.Module:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    auxiliary = {"output_router_logits": True, "router_aux_loss_coef": AUXILIARY}
    config = hf.MixtralConfig(**_DECODER, **experts, **auxiliary, experts_implementation="eager")
    return hf.MixtralForCausalLM(config)  # eager: the grouped product is not there for float64


def _t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **ids, vocab_size=VOCAB))


def _mbart() -> nn.Module:
    """With a bias behind the head, and 1 as its id of padding, as the real ones have."""
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder")
             for name, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = hf.MBartConfig(**sizes, **ids, vocab_size=VOCAB, d_model=16, init_std=0.3,
                            max_position_embeddings=128)  # fmt: skip
    model = hf.MBartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


def _llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=PIXELS[1], patch_size=2, projection_dim=16,
    )  # fmt: skip
    text = hf.LlamaConfig(**_DECODER)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=PATCHES,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def build(kind: str, seed: int = 0) -> Any:
    """A model in float64, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return globals()[f"_{kind}"]().double()


# --- Adapters -------------------------------------------------------------------------------------

_TARGETS = {
    "gpt2": ["c_attn"], "falcon": ["query_key_value"], "t5": ["q", "v"],
}  # fmt: skip
#: What is trained whole beside the adapters: heads, embeddings, norms, a router, a projector of images.
SAVED = {
    "gpt2": ["ln_f"], "llama": ["lm_head"], "gemma3": ["norm"], "qwen3": ["embed_tokens", "lm_head"],
    "falcon": ["ln_f"], "mixtral": ["gate"], "t5": ["final_layer_norm"], "mbart": ["layernorm_embedding"],
    "llava": ["multi_modal_projector"],
}  # fmt: skip
TUNINGS = ("full", "lora", "lora+saved", "prefix", "prompt")
PROMPT_LEARNING = ("prefix", "prompt")


def adapted(model: nn.Module, kind: str, tuning: str, **options: Any) -> Any:
    """``model`` with fresh adapters in float64; of LoRA, such that nothing changes yet. ``full``: as it is."""
    if tuning == "full":
        return model
    task = "SEQ_2_SEQ_LM" if kind in ENCODER_DECODERS else "CAUSAL_LM"
    if tuning in PROMPT_LEARNING:
        make = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[tuning]
        if (kind, tuning) == ("falcon", "prefix"):  # PEFT takes the queries' heads; keys have one
            options = {"num_attention_heads": 1, "token_dim": 8, **options}
        settings = make(task_type=task, num_virtual_tokens=VIRTUAL, **options)
    else:
        settings = peft.LoraConfig(
            task_type=task, r=2, lora_dropout=0.1, target_modules=_TARGETS.get(kind, ["q_proj", "v_proj"]),
            modules_to_save=SAVED[kind] if tuning == "lora+saved" else None, fan_in_fan_out=kind == "gpt2", **options,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return peft.get_peft_model(model, settings).double()


def perturb(model: nn.Module, seed: int = 3, scale: float = 0.1) -> None:
    """Moves whatever trains, so that the model is no longer its original."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x += scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)
