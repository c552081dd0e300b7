"""Text forms of the IR: infix for people, numbered statements for hashing and for golden tests."""

from __future__ import annotations

import hashlib

from .build import TRUE
from .nodes import Const, Expr, Index, Input, Load, Op, Param, Size, postorder
from .ops import OPS
from .program import Program

__all__ = ["canonical", "digest", "format_expr", "format_program"]

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
        case Index(axis=name) | Size(name=name) | Param(name=name):
            return name
        case Input(name=name, final=final):
            return name + "_final" * final
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
            text, precedence = f"{node.tensor}[{', '.join(t for t, _ in parts)}]", _ATOM
        elif isinstance(node, Op):
            text, precedence = _infix(node, parts)
        else:
            text = _leaf(node)
            precedence = 80 if text.startswith("-") else _ATOM  # a negative literal binds like unary minus
        if len(text) > _LIMIT:
            text = text[:_LIMIT] + "..."
        done[node] = text, precedence
    return done[expr][0]


def format_program(program: Program) -> str:
    """Return a readable summary of ``program`` in the shape of an ``.attn`` pattern."""
    params = []
    for scalar in program.scalars:
        default = "" if scalar.default is None else f" = {_literal(scalar.default)}"
        params.append(f"{'static ' if scalar.static else ''}{scalar.name}: {scalar.type}{default}")
    for tensor in program.tensors:
        dims = ", ".join(format_expr(d) for d in tensor.shape)
        params.append(f"{tensor.name}: {tensor.type}[{dims}]")
    lines = [f"pattern {program.name}({', '.join(params)}):"]
    for stage in program.stages:
        for branch in stage.branches:
            if branch.mask is not TRUE:
                lines.append(f"    mask = {format_expr(branch.mask)}")
            lines.append(f"    score = {format_expr(branch.score)}")
            if branch.normalizer.name != "softmax":
                lines.append(f"    normalize = {branch.normalizer.name}: {format_expr(branch.normalizer.basis)}")
            if branch.weight is not None:
                lines.append(f"    weights = {format_expr(branch.weight)}")
    return "\n".join(lines)


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
        lines.append("attend " + " ".join(f"%{number[r]}" for r in roots))
        lines += [f"term {t.name} {t.left.source} {t.right.source}" for t in stage.terms]
        for branch in stage.branches:
            norm = branch.normalizer
            stats = " ".join(f"{t.name}:{t.monoid}:{t.shift}:{int(t.seed is not None)}" for t in norm.stats)
            hooks = f"weight={int(branch.weight is not None)} group={int(branch.group is not None)}"
            lines.append(f"branch {stats} {norm.empty_row} {hooks}")
        for out in stage.outputs:
            rows = out.rows.source if out.rows else "-"
            shape = f"value={int(out.value is not None)} keys={len(out.key)} branch={out.branch}"
            lines.append(f"output {out.name} {rows} over={out.over} {out.monoid} {shape}")
        lines += [f"position {axis}" for axis, _ in stage.position]
    return "\n".join(lines) + "\n"


def digest(program: Program) -> str:
    """Return a short stable hash of :func:`canonical`, equal across processes and machines."""
    return hashlib.sha256(canonical(program).encode()).hexdigest()[:16]
