"""The reference's hidden states as a column of the data, so that training needs no second model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tnt_kernels.hf.collator import TNTDataCollator
from tnt_kernels.hf.head import head_input, plain_head
from tnt_kernels.hf.models import without_virtual_tokens
from tnt_kernels.hf.original import Original
from tnt_kernels.hf.rows import take_rows


def precompute_reference(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    data_collator: TNTDataCollator,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """The examples with the model's last hidden states, for ``TNTConfig(precomputed_reference=True)``.

    Args:
        model: the original, as it is, adapters and all (its base: ``with model.disable_adapter():`` around the call);
            its head must be a plain linear layer.
        examples: what ``data_collator`` takes.
        data_collator: makes the batches; the one to train with.
        batch_size: examples in a batch.

    Returns:
        A copy of every example with ``ref_hidden_states``, (T, H) on the CPU: of the decoder's tokens, in the dtype of
        the model.
    """
    head = plain_head(model)
    if head is None:
        raise ValueError(
            f"model: {type(model).__name__} has no plain linear head, expected one (get_output_embeddings)"
        )
    device = next(model.parameters()).device
    done: list[dict[str, Any]] = []
    with Original(model).running(model):
        for begin in range(0, len(examples), batch_size):
            part = [dict(example) for example in examples[begin : begin + batch_size]]
            batch, lengths = data_collator.padded(part)
            tokens = take_rows(batch, causal=False).labels.size(1)
            inputs = {name: x.to(device) for name, x in batch.items()}
            with head_input(head) as kept:
                model(**inputs, use_cache=False)
            found = without_virtual_tokens(model, kept[0], tokens)
            for example, hidden, length in zip(part, found, lengths, strict=True):
                done.append({**example, "ref_hidden_states": hidden[:length].cpu()})
    return done
