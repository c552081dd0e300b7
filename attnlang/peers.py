"""The same program in PyTorch's own attention functions, for comparisons.

FlexAttention takes any mask and score: the expressions become an fx graph of plain torch calls, as a user would have
written them. scaled_dot_product_attention takes a dense mask or bias where the score is the raw score plus a term that
does not depend on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    OPS,
    Const,
    Environment,
    Expr,
    Index,
    Input,
    Load,
    Op,
    Param,
    Program,
    Scalar,
    Size,
    build,
    evaluate,
    postorder,
)

__all__ = ["Bindings", "CannotExpress", "dense_bias", "flex", "sdpa", "torch_function"]

Tensor = torch.Tensor
Call: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

PLAIN: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}
"""Operators that mean the same on tensors and on Python numbers."""


class CannotExpress(Exception):
    """A peer has no way to say this program; the message says why."""


@dataclass(frozen=True)
class Bindings:
    """Values of everything a program reads besides q, k and v."""

    sizes: Mapping[str, int]
    params: Mapping[str, Scalar]
    tensors: Mapping[str, Tensor]


def torch_function(expr: Expr, inputs: tuple[str, ...], bound: Bindings) -> Callable[..., Any]:
    """Return ``expr`` as a function of ``inputs`` (axis names, or ``s``) made of plain torch calls.

    Numbers stay Python numbers and captured tensors become buffers, which is what FlexAttention compiles best.
    """
    graph = fx.Graph()
    root = torch.nn.Module()
    leaves = {name: graph.placeholder(name) for name in inputs}
    done: dict[Expr, Any] = {}
    for node in postorder(expr):
        match node:
            case Const(value=value):
                done[node] = value
            case Param(name=name):
                done[node] = bound.params[name]
            case Size(name=name):
                done[node] = bound.sizes[name]
            case Index(axis=name) | Input(name=name):
                done[node] = leaves[name]
            case Load(tensor=name):
                buffer = f"captured_{name}"
                if not hasattr(root, buffer):
                    root.register_buffer(buffer, bound.tensors[name])
                extents = bound.tensors[name].shape
                index = tuple(_clamped(graph, done[i], i, n) for i, n in zip(node.args, extents, strict=True))
                whole = graph.get_attr(buffer)
                done[node] = graph.call_function(operator.getitem, (whole, index)) if index else whole
            case Op(op=name):
                done[node] = _apply(graph, name, [done[a] for a in node.args], node)
    result = done[expr]
    if not isinstance(result, fx.Node):
        like = leaves[inputs[0]]
        dtype = {BOOL: torch.bool, INT: torch.int64, FLOAT: torch.float32}[expr.type]
        result = graph.call_function(torch.full_like, (like, result), {"dtype": dtype})
    graph.output(result)
    return fx.GraphModule(root, graph)


def _clamped(graph: fx.Graph, value: Any, index: Expr, extent: int) -> Any:
    """Positions are inside their dimension already; anything else is clamped, as the language says."""
    if isinstance(index, Index) or not isinstance(value, fx.Node):
        return value
    return graph.call_function(torch.clamp, (value, 0, max(extent - 1, 0)))


def _apply(graph: fx.Graph, name: str, args: list[Any], node: Op) -> Any:
    if not any(isinstance(a, fx.Node) for a in args):
        dtypes = {BOOL: torch.bool, INT: torch.int64, FLOAT: torch.float64}
        values = [torch.tensor(v, dtype=dtypes[a.type]) for v, a in zip(args, node.args, strict=True)]
        return OPS[name].evaluate(*values).item()
    if name in PLAIN:
        return graph.call_function(PLAIN[name], tuple(args))
    if name in ("floordiv", "mod") and isinstance(args[1], int) and args[1] > 0:
        return graph.call_function(operator.floordiv if name == "floordiv" else operator.mod, tuple(args))
    if name == "where":
        return graph.call_function(torch.where, tuple(args))
    if name in ("min", "max") and not all(isinstance(a, fx.Node) for a in args):
        value, number = args if isinstance(args[0], fx.Node) else reversed(args)
        return graph.call_function(torch.clamp, (value,), {"max" if name == "min" else "min": number})
    if name == "to_float":
        return graph.call_method("to", (args[0], torch.float32))
    return graph.call_function(OPS[name].evaluate, tuple(_tensors(graph, args)))


def _tensors(graph: fx.Graph, args: list[Any]) -> list[Any]:
    """Turn numbers among ``args`` into tensors shaped like the first tensor among them."""
    like = next(a for a in args if isinstance(a, fx.Node))

    def tensor(value: Any) -> fx.Node:
        dtype = torch.int64 if isinstance(value, int) else torch.float32
        return graph.call_function(torch.full_like, (like, value), {"dtype": dtype})

    return [a if isinstance(a, fx.Node) else tensor(a) for a in args]


def flex(program: Program, bound: Bindings, scale: float, device: torch.device) -> Call:
    """Return compiled FlexAttention with the program's mask and score; its block mask is made here.

    Raises:
        Exception: whatever torch raises where it cannot compile; callers report it and go on.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask_mod, score_mod = _mods(program, bound)
    block_mask = None
    if mask_mod is not None:
        axes = {n.axis for n in postorder(program.mask) if isinstance(n, Index)}
        batch = bound.sizes["B"] if "b" in axes else None
        heads = bound.sizes["H"] if "h" in axes else None
        make_block_mask = torch.compile(create_block_mask, dynamic=False)
        block_mask = make_block_mask(mask_mod, batch, heads, bound.sizes["Lq"], bound.sizes["Lk"], device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = bound.sizes["H"] != bound.sizes["Hkv"]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out

    return call


def _mods(program: Program, bound: Bindings) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    mask_mod = score_mod = None
    if program.mask is not build.TRUE:
        mask = torch_function(program.mask, ("b", "h", "q", "k"), bound)

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            result: Tensor = mask(b, h, q_idx, kv_idx)
            return result

    if program.score is not build.s:
        score = torch_function(program.score, ("s", "b", "h", "q", "k"), bound)

        def score_mod(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            result: Tensor = score(s, b, h, q_idx, kv_idx)
            return result

    return mask_mod, score_mod


def _added_term(score: Expr) -> Expr | None:
    """The e of a score of the form s + e with no s in e; None for the raw score."""
    if score is build.s:
        return None
    match score:
        case Op(op="add", operands=(build.s, other)) | Op(op="add", operands=(other, build.s)):
            term = other
        case Op(op="sub", operands=(build.s, other)):
            term = build.op("neg", other)
        case _:
            raise CannotExpress("the score is more than s plus a bias")
    if any(isinstance(n, Input) for n in postorder(term)):
        raise CannotExpress("the bias depends on s")
    return term


def dense_bias(program: Program, bound: Bindings, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the dense attn_mask of the program: bool, or ``dtype`` where there is a bias; None if there is neither.

    Its shape is [B or 1, H or 1, Lq, Lk].

    Raises:
        CannotExpress: the score is not the raw score plus a bias.
    """
    term = _added_term(program.score)
    lengths = (("b", "B"), ("h", "H"), ("q", "Lq"), ("k", "Lk"))

    def along(n: int, dim: int) -> Tensor:
        return torch.arange(n, device=device).view([-1 if d == dim else 1 for d in range(4)])

    axes = {axis: along(bound.sizes[size], dim) for dim, (axis, size) in enumerate(lengths)}
    env = Environment(axes, bound.sizes, bound.params, bound.tensors, {}, torch.float32, device)
    shape = (1, 1, bound.sizes["Lq"], bound.sizes["Lk"])
    mask = None
    if program.mask is not build.TRUE:
        mask = evaluate(program.mask, env)
        mask = mask.expand(torch.broadcast_shapes(mask.shape, shape))
    if term is None:
        return mask
    bias = evaluate(term, env).to(dtype)
    if mask is not None:
        bias = torch.where(mask, bias, float("-inf"))
    return bias.expand(torch.broadcast_shapes(bias.shape, shape))


def sdpa(program: Program, bound: Bindings, scale: float, dtype: torch.dtype, device: torch.device) -> Call:
    """Return scaled_dot_product_attention with the program as a dense mask, or ``is_causal`` where that is the mask.

    Raises:
        CannotExpress: the score is not the raw score plus a bias.
    """
    square = bound.sizes["Lq"] == bound.sizes["Lk"]
    causal = square and program.score is build.s and program.mask in _CAUSAL
    bias = None if causal else dense_bias(program, bound, dtype, device)
    grouped = bound.sizes["H"] != bound.sizes["Hkv"]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    return call


_CAUSAL = (build.op("le", build.k, build.q), build.op("ge", build.q, build.k))
