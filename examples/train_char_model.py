"""Train a small character model with an attention variant of its own, and check it against dense attention.

The variant packs documents into rows (no attention across documents), looks back over a sliding window, and adds a
learnable bias per head and distance. The same model is trained twice from the same weights: once with the compiled
kernel, forward and backward, and once with dense PyTorch attention. The loss curves must lie on each other.

    python examples/train_char_model.py [--steps 120] [--out out/train_char_model.png]
"""

from __future__ import annotations

import argparse
import builtins
import inspect
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

import attnlang as al

PROGRAM = """
pattern packed_local(window: int = 128, doc: int[B, Lk], bias: float[H, W]):
    \"\"\"Packed documents, a sliding window, and a learnable bias per head and distance.\"\"\"
    let distance = q - k
    mask = 0 <= distance < window and doc[b, q] == doc[b, k]
    score = s + bias[h, min(max(distance, 0), W - 1)]
"""
WINDOW, LENGTH, BATCH, WIDTH, HEADS, LAYERS = 128, 512, 4, 128, 4, 2

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def documents() -> list[str]:
    """English text that every Python has: the docstrings of its built-in functions and types."""
    found = [inspect.getdoc(x) for x in vars(builtins).values()]
    for kind in (str, list, dict, bytes, set, int, float, complex, tuple, memoryview):
        found += [inspect.getdoc(x) for x in vars(kind).values()]
    return sorted({text for text in found if text and len(text) > 80})


def batches(steps: int, seed: int = 0) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Return the alphabet size and ``steps`` batches of (tokens [B, L + 1], document ids [B, L])."""
    texts = documents()
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        rows, ids = [], []
        for _ in range(BATCH):
            row: list[int] = []
            doc: list[int] = []
            while len(row) <= LENGTH:
                text = texts[int(torch.randint(len(texts), (1,), generator=generator))]
                row += [alphabet[c] for c in text]
                doc += [doc[-1] + 1 if doc else 0] * len(text)
            rows.append(row[: LENGTH + 1])
            ids.append(doc[:LENGTH])
        out.append((torch.tensor(rows), torch.tensor(ids, dtype=torch.int32)))
    return len(alphabet), out


def compiled() -> Attention:
    attn = al.compile(al.parse(PROGRAM))
    return lambda q, k, v, doc, bias: attn(q, k, v, window=WINDOW, doc=doc, bias=bias)


def dense(q: Tensor, k: Tensor, v: Tensor, doc: Tensor, bias: Tensor) -> Tensor:
    """The same attention as a user would write it, with all N x N scores."""
    n = q.shape[2]
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    mask = ((distance >= 0) & (distance < WINDOW))[None] & (doc[:, :, None] == doc[:, None, :])
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias[:, distance.clamp(0, bias.shape[1] - 1)]
    return torch.softmax(scores.masked_fill(~mask[:, None], -math.inf), -1) @ v


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.zeros(HEADS, WINDOW))

    def forward(self, x: Tensor, doc: Tensor, attention: Attention) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.first(x)).view(batch, length, 3, HEADS, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = attention(q, k, v, doc, self.bias).transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.out(mixed)
        return x + self.mlp(self.second(x))


class Model(nn.Module):
    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(alphabet, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, alphabet)

    def forward(self, tokens: Tensor, doc: Tensor, attention: Attention) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, doc, attention)
        return self.head(self.norm(x))


def train(
    name: str, attention: Attention, alphabet: int, data: list[tuple[Tensor, Tensor]]
) -> tuple[list[float], float]:
    """Return the loss of every step and the seconds it took; every run starts from the same weights."""
    torch.manual_seed(0)
    model = Model(alphabet)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    start = time.perf_counter()
    for tokens, doc in track(data, description=f"{name:>9}"):
        logits = model(tokens[:, :-1], doc, attention)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def picture(path: Path, curves: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    styles = {"dense": {"linewidth": 5, "alpha": 0.35}, "attnlang": {"linewidth": 1.4}}
    for name, losses in curves.items():
        axes.plot(losses, label=name, **styles[name])
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per character)")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("out/train_char_model.png"))
    options = parser.parse_args()
    alphabet, data = batches(options.steps)
    curves, seconds = {}, {}
    for name, attention in (("dense", dense), ("attnlang", compiled())):
        curves[name], seconds[name] = train(name, attention, alphabet, data)
    gap = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    for name, losses in curves.items():
        print(f"{name:>9}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {seconds[name]:.1f} s")
    print(f"largest difference between the two loss curves: {gap:.1e}")
    picture(options.out, curves)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
