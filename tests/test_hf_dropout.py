"""``disable_dropout`` reaches every kind of chance, and ``check_deterministic`` names what it cannot reach."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hf_tiny import VOCAB, tiny
from torch import nn
from torch.nn import functional as F

from tnt_kernels.hf.dropout import check_deterministic, disable_dropout

transformers = pytest.importorskip("transformers")

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "num_local_experts": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_experts": 4,
}  # fmt: skip
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
#: What is random in each, beside layers of dropout: config numbers read in a forward, float attributes, jitter,
#: dropped layers.
MODELS = (
    "FalconForCausalLM", "PersimmonForCausalLM", "PhimoeForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration",
    "BartForConditionalGeneration", "MixtralForCausalLM", "BloomForCausalLM", "OPTForCausalLM", "GPTNeoXForCausalLM",
    "SwitchTransformersForConditionalGeneration", "StableLmForCausalLM", "LlamaForCausalLM",
)  # fmt: skip


def build(name, change=0.3):
    """A tiny model in train mode, with everything random switched on."""
    kind = getattr(transformers, name).config_class
    own = kind()
    names = {*vars(own), *kind.attribute_map}
    config = kind(**{k: x for k, x in {**_SIZES, **_TOKENS}.items() if k in names})
    for name_, value in list(vars(config).items()):
        chance = ("drop" in name_ or "jitter" in name_) and not isinstance(value, bool)
        if chance and isinstance(value, (int, float)):
            setattr(config, name_, change)
    config.use_cache = False
    torch.manual_seed(0)
    return getattr(transformers, name)(config).train()


def inputs(model):
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    )


def forward_of(model):
    batch = inputs(model)
    return lambda: model(**batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_two_forwards_are_equal(name, tmp_path):
    """In train mode, and the config that is saved keeps its values."""
    model = build(name)
    forward, saved = forward_of(model), model.config.to_dict()
    assert not torch.equal(forward(), forward())
    with pytest.raises(ValueError, match="two forwards of one batch differ"):
        check_deterministic(model, forward)
    expected = model.eval()(**inputs(model)).logits
    disable_dropout(model.train())
    check_deterministic(model, forward)
    assert torch.equal(forward(), forward())
    torch.testing.assert_close(forward(), expected)
    assert model.config.to_dict() == saved
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    dropped = {k for k, x in saved.items() if x == 0.3}
    assert dropped
    assert all(kept[k] == 0.3 for k in dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_router_jitter_of_one_percent_is_named(dtype):
    model = build("PhimoeForCausalLM", change=0.0).to(dtype)
    forward = forward_of(model)
    check_deterministic(model, forward)
    blocks = [layer.mlp for layer in model.model.layers]
    for module in (*blocks, *(block.router for block in blocks)):
        assert module.input_jitter_noise == 0.0
        module.input_jitter_noise = 0.01
    with pytest.raises(ValueError, match=r"inputs are equal: model\.layers\.0\..*\(Phimoe"):
        check_deterministic(model, forward)
    disable_dropout(model)
    check_deterministic(model, forward)


class Constant(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3, self.training)


@pytest.mark.parametrize("many", [1, 5])
def test_a_constant_dropout_is_named(many):
    model = tiny("gpt2").train()
    model.transformer.h[1].mlp.act = nn.Sequential(*(Constant() for _ in range(many)))
    disable_dropout(model)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="two forwards") as error:
        check_deterministic(model, forward_of(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert "transformer.h.1.mlp.act.0 (Constant)" in str(error.value)
    assert "set what is random in them to 0 in the model, or disable_dropout=False" in str(
        error.value
    )
    assert str(error.value).count("(Constant)") == 1
    assert "more" not in str(error.value)
    hooks = sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules())
    assert hooks == 0


def test_three_modules_are_named_at_most():
    """Modules side by side, which all get equal inputs."""

    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(Constant() for _ in range(5))

        def forward(self, x):
            return sum(part(x) for part in self.parts)

    model, x = Side().train(), torch.ones(3, 4)
    with pytest.raises(
        ValueError, match=r"parts\.0 .*parts\.1 .*parts\.2 \(Constant\) and 2 more;"
    ):
        check_deterministic(model, lambda: model(x))


def test_a_forward_of_the_model_itself_is_named():
    """One that reads its own config, whose values are to be saved."""
    model = build("ProphetNetForConditionalGeneration")
    disable_dropout(model)
    with pytest.raises(ValueError, match=r"prophetnet\.encoder \(ProphetNetEncoder\)"):
        check_deterministic(model, forward_of(model))
    model.prophetnet.encoder.config.dropout = 0.0
    check_deterministic(model, forward_of(model))


def test_rounding_is_no_chance():
    """Of kernels that add up in any order: the same from one seed as from two."""
    noise = torch.Generator().manual_seed(0)
    model = nn.Linear(8, 8)
    x = torch.randn(4, 8)

    def forward(size):
        return model(x) * (1 + size * torch.randn(4, 8, generator=noise))

    check_deterministic(model, lambda: forward(1e-6))
    with pytest.raises(ValueError, match="none but the whole, Linear"):
        check_deterministic(model, lambda: forward(0.1))  # no rounding is that large
    with pytest.raises(ValueError, match="two forwards"):
        check_deterministic(model, lambda: forward(1e-6) + 1e-4 * torch.randn(4, 8))


def test_what_modules_read_of_their_config_stays_live():
    """But for the numbers of dropout: the view is not a copy, and a copy of the model has its own."""
    model = build("GPT2LMHeadModel")
    disable_dropout(model)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    attention = model.transformer.h[0].attn
    assert attention.config.attn_pdrop == 0.0
    assert model.config.attn_pdrop == 0.3
    assert attention.config is model.transformer.h[1].attn.config
    model.set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    assert model(**inputs(model), output_attentions=True).attentions[0] is not None
    for other in others:
        assert other.transformer.h[0].attn.config._attn_implementation == "sdpa"
        other.set_attn_implementation("eager")
        assert other.transformer.h[0].attn.config._attn_implementation == "eager"
        check_deterministic(other, forward_of(other))
        assert other.config.to_dict() == model.config.to_dict()
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = attention.config.nothing_like_it


def test_a_config_without_chance_is_left_alone():
    model = tiny("llama")
    disable_dropout(model)
    assert model.model.layers[0].self_attn.config is model.config


def test_gradient_checkpointing_and_adapters_go_on():
    peft = pytest.importorskip("peft")
    base = build("FalconForCausalLM")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["query_key_value"], lora_dropout=0.3
    )
    model = peft.get_peft_model(base, lora).train()
    for name, x in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(x)
    disable_dropout(model)
    assert isinstance(model.config, transformers.PreTrainedConfig)
    assert model.config.hidden_dropout == 0.3
    forward = forward_of(model)
    check_deterministic(model, forward)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        forward().square().mean().backward()
        gradients.append([x.grad.clone() for x in model.parameters() if x.grad is not None])
    assert gradients[0]
    assert all(map(torch.equal, *gradients))


def test_recurrent_layers_and_attention_of_torch_are_reached():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4, 2, dropout=0.5)
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.5)

        def forward(self, x):
            x = self.lstm(x)[0]
            return self.attention(x, x, x)[0]

    model, x = Model().train(), torch.randn(5, 2, 4)
    with pytest.raises(ValueError, match=r"lstm \(LSTM\)"):
        check_deterministic(model, lambda: model(x))
    disable_dropout(model)
    check_deterministic(model, lambda: model(x))


@pytest.mark.parametrize(
    ("answers", "forwards"), [((True,), 2), ((False, True), 5), ((False, False), 7)]
)
def test_processes_run_as_many_forwards(answers, forwards):
    """One whose forwards are equal runs on with another whose forwards are not, and raises with it."""
    runs, given = [], iter(answers)

    def forward():
        runs.append(1)
        return torch.ones(3)

    def check():
        check_deterministic(torch.nn.Linear(2, 2), forward, lambda here: here and next(given))

    if answers[-1]:
        check()
    else:
        with pytest.raises(ValueError, match="two forwards of one batch differ"):
            check()
    assert len(runs) == forwards
