"""Programs with groups, and with outputs that a key spreads over buckets, and what they are compared with."""

from __future__ import annotations

from collections import defaultdict

import torch

import attnlang as al
from attnlang import library
from attnlang.grammar import parse
from attnlang.ir import INT, Environment, Program, evaluate, reference

__all__ = ["PROGRAMS", "SHARP", "SMOOTH", "compare", "leaves"]

Tensor = torch.Tensor

TEXT = """
pattern softmax_in_groups(label: int[B, Lk], gate: float[B, Lq, 3]):
    \"\"\"Keys of label -1 are in no group and take no weight; nobody has label 2.\"\"\"
    mask = k <= q + 9 and label[b, k] >= 0
    group = label[b, k]
    groups = 3
    normalize:
        stat top = max(s, by=group)
        stat part = sum(exp(s - top), by=group)
        weight = exp(s - top) / part
    weights = w * gate[b, q, label[b, k]]
    output spread = part * exp(top)

pattern groups_of_pairs(slope: float[H]):
    \"\"\"Groups by distance; a row statistic takes part, and a seed.\"\"\"
    mask = k <= q and q % 7 > 0
    score = s + slope[h] * (k - q)
    group = min((q - k) // 12, 2)
    groups = 3
    normalize:
        stat m = max(s)
        stat own = sum(exp(s - m), by=group, seed=exp(slope[h] - m))
        stat l = sum(exp(s - m) * own)
        stat all = sum(exp(s - m))
        weight = exp(s - m) * own / l
    output shares = own / all
    output entropy = sum(-w * log(w), over=k)

pattern distances:
    \"\"\"Two histograms by distance, one of them by two keys, beside ordinary attention.\"\"\"
    mask = k <= q and q > 1
    output near = sum(w, over=k, key=min((q - k) // 4, 5), extent=6)
    output both = sum(w * float(q - k), over=k, key=((q - k) % 3 - 1, k // 32), extent=(2, 3))

pattern read_by_pairs(bucket: int, bias: float[B, H, Lq, Lk], head: float[H]):
    \"\"\"Captured tensors in buckets, a parameter called like one, and dropout.\"\"\"
    mask = k <= q and (q + h) % 5 > 0
    score = s + bias[b, h, q, k]
    weights = dropout(w * head[h], 0.2, bucket)
    output mass = sum(w, over=k, key=(k + h) % 3, extent=bucket)

pattern rows_in_buckets:
    normalize = elementwise(sigmoid(s), divisor=count)
    output o = sum(w * V, over=k, key=(q + k) % 3, extent=3)

pattern columns(slot: int[Lq]):
    mask = k <= q
    output maps = sum(w, over=q, key=slot[q], extent=2)
    output received = sum(w, over=q)

pattern block_sums:
    mask = abs(q - k) < 30
    output total = sum(w * w, over=(q, k))
    output blocks = sum(w, over=(q, k), key=(k // 16, q // 32), extent=(5, 3))
    output bands = sum(w * s, over=(q, k), key=q // 32, extent=2)
    output by_distance = sum(w, over=(q, k), key=(q - k + 30) // 16, extent=4)

pattern block_maxima:
    values = none
    mask = k <= q
    output maxima = max(w, over=(q, k), key=(q // 32, k // 16), extent=(3, 5), empty=-2.0)
    output highest = max(s, over=k, key=k // 16, extent=5, empty=-3.0)
"""

_PATTERNS = parse(TEXT).patterns
PROGRAMS: dict[str, Program] = {**_PATTERNS, "landmark": library.landmark}
NUMBERS: dict[str, dict[str, float]] = defaultdict(
    dict, read_by_pairs={"bucket": 3}, landmark={"block": 8, "factor": 0.25}
)
"""Scalar parameters."""
SHARP = ("block_maxima",)
"""Programs whose gradients go to the pair that made an extremum."""
SMOOTH = tuple(n for n in PROGRAMS if n not in SHARP)


def leaves(program: Program, length: int, heads: tuple[int, int] = (4, 2), dim: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"B": 2, "H": heads[0], "Lq": length, "Lk": length}
    found = {
        n: torch.randn(2, count, length, dim, generator=generator)
        for n, count in zip("qkv", (*heads, heads[1]), strict=True)
    }
    for t in program.tensors:
        shape = [int(evaluate(d, Environment(sizes=sizes))) for d in t.shape]
        ints = torch.randint(-1, 2, shape, generator=generator)
        found[t.name] = ints if t.type is INT else torch.rand(shape, generator=generator)
    return found


def results(program: Program, given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    operands, others = [given[n] for n in "qkv"], {n: t for n, t in given.items() if n not in "qkv"}
    (b, h, lq, d), (_, hkv, lk, _) = operands[0].shape, operands[1].shape
    if backend == "reference":
        sizes = {"B": b, "H": h, "Hkv": hkv, "Lq": lq, "Lk": lk}
        return reference(program, *operands, sizes, dict(NUMBERS[program.name]), others, d**-0.5)
    both = {"return_lse": True} if "lse" in program.results else {}
    found = al.compile(program, backend=backend or None)(
        *operands, **others, **NUMBERS[program.name], return_aux=True, **both
    )
    if isinstance(found, dict):
        return found
    return {**dict(zip(("o", "lse"), found[:-1], strict=False)), **found[-1]}


def everything(
    program: Program, given: dict[str, Tensor], dtype: torch.dtype, backend: str, wanted: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every result and every gradient, by name."""
    at = {n: t.to(dtype).requires_grad_(wanted) if t.is_floating_point() else t for n, t in given.items()}
    made = results(program, at, backend)
    if not wanted:
        return made, {}
    generator = torch.Generator().manual_seed(1)
    loss = []
    for _, t in sorted(made.items()):
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        loss.append((torch.where(t.isfinite(), t.double(), 0.0) * weights).sum())
    floats = {n: t for n, t in at.items() if t.is_floating_point()}
    grads = torch.autograd.grad(torch.stack(loss).sum(), list(floats.values()), allow_unused=True)
    return made, {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(floats.items(), grads, strict=True)}


def compare(program: Program, given: dict[str, Tensor], backend: str, wanted: bool = True) -> None:
    want, want_grads = everything(program, given, torch.float64, "reference", wanted)
    got, grads = everything(program, given, torch.float32, backend, wanted)
    assert list(got) == list(want)
    for n, t in want.items():
        torch.testing.assert_close(got[n].double(), t, atol=1e-4, rtol=1e-4, msg=lambda text, n=n: f"{n}: {text}")
    for n, t in want_grads.items():
        size = max(1e-3, float(t.abs().max())) if t.numel() else 1.0
        torch.testing.assert_close(
            grads[n].double(), t, atol=1e-4 * size, rtol=1e-4, msg=lambda text, n=n: f"gradient of {n}: {text}"
        )
