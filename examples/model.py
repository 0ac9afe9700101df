"""A small language model and batches for the recipes: bring your own of both."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH = 96, 32, 16
UNWANTED = torch.tensor([7, 8, 9])  # token ids that the model should stop producing


class LanguageModel(nn.Module):
    """Bag of the last two tokens; ``head`` makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.previous = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embedding(tokens) + self.previous(tokens.roll(1, dims=1)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def batches(count: int, rows: int = 8, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Tokens as the original model would produce them, and their weights: -1 where a token is unwanted."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
        weights = torch.where(torch.isin(tokens, UNWANTED), -1.0, 1.0)
        yield {"tokens": tokens, **shifted(tokens, weights)}


def shifted(tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Position t predicts token t + 1. Labels and weights move, the logits never do; nothing follows the last token."""
    weights = weights.roll(-1, dims=1)
    weights[:, -1] = 0
    return {"labels": tokens.roll(-1, dims=1), "weights": weights}
