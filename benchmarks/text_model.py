"""A small transformer that predicts the next character of a text, and the text as batches."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention


class Block(nn.Module):
    """A layer of the transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, w = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, w // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, w))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Logits of the next character: int64[b, t] to float32[b, t, characters]."""

    def __init__(self, characters: int, *, width: int, layers: int, heads: int, length: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(x) + self.place.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(embedded)))


class Text(NamedTuple):
    """A text as numbers; its last tenth is for validation."""

    train: torch.Tensor  # int64[m]
    validation: torch.Tensor
    characters: int
    length: int  # of a piece

    @classmethod
    def read(cls, path: Path, length: int) -> Text:
        """The text of a file, `.xz` or plain."""
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode(errors="ignore")
        number = {c: i for i, c in enumerate(sorted(set(text)))}
        codes = torch.tensor([number[c] for c in text])
        split = len(codes) * 9 // 10
        return cls(codes[:split], codes[split:], len(number), length)

    def batch(self, size: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random pieces, and the same one character later."""
        starts = torch.randint(len(self.train) - self.length - 1, (size,), generator=draw)
        return self._pairs(self.train, starts)

    def validation_pieces(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pieces from all over the last tenth."""
        starts = torch.arange(count) * ((len(self.validation) - self.length - 1) // count)
        return self._pairs(self.validation, starts)

    def _pairs(
        self, codes: torch.Tensor, starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.stack([codes[s : s + self.length + 1] for s in starts])
        return x[:, :-1], x[:, 1:]


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over characters, in nats."""
    return cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
