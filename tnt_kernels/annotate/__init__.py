"""From annotations to the ``weights`` and ``negative_ids`` of the losses: spans, blocklists, corrections, phrases.

Works on padded batches of token ids; needs no tokenizer library. What is returned is aligned with the ids: position t
speaks of token t. For a causal model, whose row t of logits predicts token t + 1, shift it like the labels.
"""

from tnt_kernels.annotate.phrases import NegativePhrases, negative_ids_from_phrases
from tnt_kernels.annotate.tokens import token_bytes, token_offsets
from tnt_kernels.annotate.weights import (
    weights_from_blocklist,
    weights_from_correction,
    weights_from_spans,
)

__all__ = [
    "NegativePhrases",
    "negative_ids_from_phrases",
    "token_bytes",
    "token_offsets",
    "weights_from_blocklist",
    "weights_from_correction",
    "weights_from_spans",
]
