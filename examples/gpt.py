"""A small GPT: a decoder-only transformer, in as few lines as it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes that make up a model."""

    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int


class Attention(nn.Module):
    """Every token looks back at the tokens before it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # (batch, time, 3 * width) -> three of (batch, head, time, width / heads)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return attended


class MLP(nn.Module):
    """Every token thinks for itself."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        thought: Tensor = self.down(F.gelu(self.up(x)))
        return thought


class Block(nn.Module):
    """Look back, then think; each adds to what the token already carries."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT(nn.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.token.weight  # the same table reads and writes
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        times = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(times)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats, worked out in float32 at least."""
        logits = self(tokens).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten())

    @torch.no_grad()
    def write(self, prompt: bytes, length: int, temperature: float, seed: int) -> bytes:
        """Continue the prompt by `length` sampled bytes."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt)], device=self.token.weight.device)
        for _ in range(length):
            logits = self(text[:, -self.shape.context :])[0, -1].double().cpu()
            chances = F.softmax(logits / temperature, dim=-1)
            token = torch.multinomial(chances, 1, generator=generator).to(text.device)
            text = torch.cat((text, token[None]), dim=1)
        return bytes(text[0].tolist())

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # What the blocks add up grows with their number: keep its variance near one block's.
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.shape.layers))
