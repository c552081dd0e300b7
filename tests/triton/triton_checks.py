"""Run a program through the Triton backend and through the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attnlang.ir import Const, Program, Scalar, Size, reference_attention
from attnlang.runtime.call import Call
from attnlang.sparsity import analyse

Tensor = torch.Tensor


def sizes_of(program: Program, q: Tensor, k: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    sizes = {"B": q.shape[0], "H": q.shape[1], "Hkv": k.shape[1], "Lq": q.shape[2], "Lk": k.shape[2]}
    for param in program.tensors:
        for dim, n in zip(param.shape, tensors[param.name].shape, strict=True):
            if isinstance(dim, Size):
                sizes.setdefault(dim.name, n)
            else:
                assert isinstance(dim, Const)
    return sizes


def make_call(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Mapping[str, Tensor] | None = None,
    params: Mapping[str, Scalar] | None = None,
    scale: float | None = None,
) -> Call:
    tensors, params = dict(tensors or {}), dict(params or {})
    sizes = sizes_of(program, q, k, tensors)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    known: dict[tuple[int, int], object] = {}

    def runs(tile: tuple[int, int]) -> object:
        if tile not in known:
            known[tile] = analyse(program, sizes, params, tensors, tile=tile)
        return known[tile]

    return Call(program, q, k, v, sizes, params, tensors, scale, runs)  # type: ignore[arg-type]


def check(call: Call, *, atol: float = 2e-5, rtol: float = 2e-5) -> None:
    """Compare the interpreted kernel with the reference on the same (rounded) inputs."""
    from attnlang.runtime import triton as backend

    o, lse = backend.forward(call)
    want, want_lse = reference_attention(
        call.program, call.q, call.k, call.v, call.sizes, call.params, call.tensors, call.scale
    )
    assert o.dtype is call.q.dtype
    assert lse.dtype is torch.float32
    assert o.shape == want.shape
    torch.testing.assert_close(lse.double(), want_lse, atol=atol, rtol=rtol, equal_nan=True)
    torch.testing.assert_close(o.double(), want, atol=atol, rtol=rtol, equal_nan=True)


def qkv(
    batch: int = 1,
    heads: int = 2,
    lq: int = 33,
    lk: int = 33,
    dim: int = 16,
    *,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    hkv = heads if kv_heads is None else kv_heads
    q = torch.randn(batch, heads, lq, dim).to(dtype)
    k = torch.randn(batch, hkv, lk, dim).to(dtype)
    v = torch.randn(batch, hkv, lk, dim if value_dim is None else value_dim).to(dtype)
    return q, k, v
