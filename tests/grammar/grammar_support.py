"""Shared by the tests of the language: dense evaluation of a program's hooks."""

from __future__ import annotations

import torch

from attnlang import ir

SIZES = {"B": 2, "H": 4, "Hkv": 2, "Lq": 12, "Lk": 16}


def axes(sizes=SIZES):
    """Index tensors b [B,1,1,1], h [1,H,1,1], q [1,1,Lq,1], k [1,1,1,Lk]."""
    shape = [sizes["B"], sizes["H"], sizes["Lq"], sizes["Lk"]]
    return [torch.arange(n).view([-1 if d == i else 1 for d in range(4)]) for i, n in enumerate(shape)]


def environment(program, params=None, tensors=None, sizes=SIZES):
    """An environment for ``program``: defaults where ``params`` has nothing, a fixed random score."""
    b, h, q, k = axes(sizes)
    values = {p.name: p.default for p in program.scalars} | (params or {})
    full = [sizes["B"], sizes["H"], sizes["Lq"], sizes["Lk"]]
    s = torch.randn(full, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ir.Environment({"b": b, "h": h, "q": q, "k": k}, sizes, values, tensors or {}, {"s": s})


def mask_of(program, params=None, tensors=None, sizes=SIZES):
    """The mask as a bool tensor [B, H, Lq, Lk]."""
    full = [sizes["B"], sizes["H"], sizes["Lq"], sizes["Lk"]]
    return ir.evaluate(program.mask, environment(program, params, tensors, sizes)).expand(full)


def score_of(program, params=None, tensors=None, sizes=SIZES):
    """The modified score [B, H, Lq, Lk] and the raw score it was made of."""
    env = environment(program, params, tensors, sizes)
    full = [sizes["B"], sizes["H"], sizes["Lq"], sizes["Lk"]]
    return ir.evaluate(program.score, env).expand(full), env.inputs["s"]
