"""Text forms of the IR: infix for people, numbered statements for hashing and for golden tests."""

from __future__ import annotations

import hashlib

from .nodes import Const, Expr, Index, Input, Load, Op, Param, Size, postorder
from .ops import OPS
from .program import Program
from .stages import STAGE_INPUTS, Map, Pool, Select, Stage

__all__ = ["canonical", "digest", "format_expr"]

_ATOM = 1000
_LIMIT = 4000  # characters; shared sub-expressions can make the infix form exponentially long


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _leaf(node: Expr) -> str:
    match node:
        case Const(value=value):
            return _literal(value)
        case Index(axis=name) | Size(name=name) | Param(name=name) | Input(name=name):
            return name
    raise TypeError(f"not a leaf: {type(node).__name__}")


def _infix(node: Op, parts: list[tuple[str, int]]) -> tuple[str, int]:
    spec = OPS[node.op]
    texts = [text for text, _ in parts]
    if node.op == "where":
        condition, then = (f"({text})" if precedence <= 5 else text for text, precedence in parts[:2])
        return f"{then} if {condition} else {texts[2]}", 5
    if not spec.symbol:
        name = node.op.removeprefix("to_") if node.op.startswith("to_") else node.op
        return f"{name}({', '.join(texts)})", _ATOM
    own = spec.precedence

    def wrap(i: int, strict: bool) -> str:
        text, precedence = parts[i]
        return f"({text})" if precedence < own or (strict and precedence == own) else text

    if len(parts) == 1:
        return f"{spec.symbol}{wrap(0, False)}", own
    compares = own == 40  # chained comparisons mean something else
    return f"{wrap(0, compares or own == 90)} {spec.symbol} {wrap(1, own != 90)}", own  # ** groups from the right


def format_expr(expr: Expr) -> str:
    """Return ``expr`` as ``.attn`` text; a very long expression is cut with an ellipsis."""
    done: dict[Expr, tuple[str, int]] = {}
    for node in postorder(expr):
        parts = [done[a] for a in node.args]
        if isinstance(node, Load):
            name = node.tensor.upper() if node.tensor in STAGE_INPUTS else node.tensor
            text, precedence = f"{name}[{', '.join(t for t, _ in parts)}]", _ATOM
        elif isinstance(node, Op):
            text, precedence = _infix(node, parts)
        else:
            text = _leaf(node)
            precedence = 80 if text.startswith("-") else _ATOM  # a negative literal binds like unary minus
        if len(text) > _LIMIT:
            text = text[:_LIMIT] + "..."
        done[node] = text, precedence
    return done[expr][0]


def _structure(stage: Stage) -> list[str]:
    """What of a stage is not an expression, and which of its optional expressions there are."""
    if isinstance(stage, Map):
        return [f"map {stage.name} " + " ".join(f"{name}:{monoid}" for name, monoid, _ in stage.lets)]
    if isinstance(stage, Pool):
        return [f"pool {stage.name} {stage.source} {stage.how} {int(stage.stride is not None)}"]
    if isinstance(stage, Select):
        given = [n for n in ("top", "threshold", "mass") if getattr(stage, n) is not None]
        return [f"select {stage.name} {' '.join(given)}"]
    lines = [
        f"term {t.name} {t.left.source}:{len(t.left.index)} {t.right.source}:{len(t.right.index)} {t.body is not None}"
        for t in stage.terms
    ]
    for branch in stage.branches:
        stats = " ".join(
            f"{t.name}:{t.monoid}:{int(t.seed is not None)}:{int(t.grouped)}" for t in branch.normalizer.stats
        )
        lines.append(f"branch {stats} weight={int(branch.weight is not None)} group={int(branch.group is not None)}")
    for out in stage.outputs:
        source = f"{out.rows.source}:{len(out.rows.index)}" if out.rows else "-"
        shape = f"keys={len(out.key)} branch={out.branch} empty={out.empty!r}"
        lines.append(f"output {out.name} {source} over={out.over} {out.monoid} {shape}")
    lines += [f"position {axis}" for axis, _ in stage.position]
    return lines


def canonical(program: Program) -> str:
    """Return a text that is equal for two programs exactly when they mean the same kernel.

    Names of parameters matter, names of programs and docstrings do not. Linear in the number of nodes.
    """
    lines: list[str] = []
    number: dict[Expr, int] = {}

    def add(*roots: Expr) -> None:
        for node in postorder(*roots):
            if node in number:
                continue
            refs = " ".join(f"%{number[a]}" for a in node.args)
            match node:
                case Op(op=name):
                    text = f"{name} {refs}"
                case Load(tensor=name):
                    text = f"load {name} {refs}"
                case Const(value=value):
                    text = f"const {value.hex() if isinstance(value, float) else value!r}"
                case _:
                    text = f"{type(node).__name__.lower()} {_leaf(node)}"
            number[node] = len(number)
            lines.append(f"%{number[node]}: {node.type} = {text.rstrip()}")

    for scalar in program.scalars:
        lines.append(f"scalar {scalar.name}: {scalar.type}{' static' if scalar.static else ''}")
    for tensor in program.tensors:
        add(*tensor.shape)
        dims = " ".join(f"%{number[d]}" for d in tensor.shape)
        lines.append(f"tensor {tensor.name}: {tensor.type} [{dims}]")
    for stage in program.stages:
        roots = stage.roots()
        add(*roots)
        lines.append(f"{type(stage).__name__.lower()} " + " ".join(f"%{number[r]}" for r in roots))
        lines += _structure(stage)
    if program.returns:
        lines.append(f"return {' '.join(program.returns)}")
    return "\n".join(lines) + "\n"


def digest(program: Program) -> str:
    """Return a short stable hash of :func:`canonical`, equal across processes and machines."""
    return hashlib.sha256(canonical(program).encode()).hexdigest()[:16]
