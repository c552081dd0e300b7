"""Words that mean something in one place only, and what names that are called stand for."""

from __future__ import annotations

from attnlang.ir import Attend, Input, Program, TensorParam

from . import syntax as ast
from .errors import suggest
from .scope import Poisoned, Scope, Template

__all__ = ["FORMS", "OPERANDS", "OVER_D", "callee", "changes", "describe", "only_hooks"]

OPERANDS = {"Q": "q", "K": "k", "V": "v"}
"""How a program writes the operands of the call."""
OVER_D = {"sum_d": "sum", "mean_d": "mean", "max_d": "max"}
FORMS = {
    "sum": "it reduces: `output name = sum(w, over=k)`, or `stat name = sum(...)` in a `normalize:` block",
    "each": "it says what nothing gives: `output name = each(m + log(l), empty=-inf)`",
    "argmax": "it reduces: `output name = argmax(w, over=k)`",
    "softmax": "it is a normaliser: `normalize = softmax(sink=...)`",
    "elementwise": "it is a normaliser: `normalize = elementwise(sigmoid(s))`",
    "sparsemax": "it is a normaliser: `normalize = sparsemax()`",
    "entmax15": "it is a normaliser: `normalize = entmax15()`",
    "root": "it is a statistic of a `normalize:` block: `stat t = root(max(s - t, 0), seed=m - 1)`",
    "dot": "it is a score term: `term t = dot(Q, table[...])`",
    "sum_d": "it sums over features, in a `term` or in `rows`",
    "mean_d": "it is a mean over features, in `rows`",
    "max_d": "it is a maximum over features, in `rows`",
    "top": "it is a rule: `select name[rows, keys] = top(score, count)`",
    "mean": "it pools: `pool name = mean(K, block=64)`",
}
"""Words that stand in front of parentheses without being functions, and where."""

_INPUTS = {"s": "the score", "raw": "the raw score", "w": "the weight", "p": "the weight before `weights`"}


def describe(node: Input) -> str:
    """Say in words what an input of the core is."""
    return f"{_INPUTS.get(node.name, 'term' if 'k' in node.axes else 'row statistic')} `{node.name}`"


def changes(program: Program) -> str:
    """Say what else than masking a pattern does."""
    return "changes the score" if only_hooks(program) else "is more than a mask and a score"


def only_hooks(program: Program) -> bool:
    """Whether a program is a mask and a score, on the rows of q, k and v as they come."""
    return program.standard and program.attend.operands() == Attend().operands()


def callee(node: ast.Node, scope: Scope, known: list[str]) -> Template:
    """Return the helper or pattern that ``node`` names."""
    names = scope.names
    if isinstance(node, ast.Attribute) and isinstance(node.base, ast.Name):
        module = names.modules.get(node.base.id)
        if module is None:
            hint = suggest(node.base.id, names.modules)
            raise scope.error(node.base, "ATL200", f"no imported file is called `{node.base.id}`", hint)
        table, name, where = module, node.name.id, f" in `{node.base.id}`"
    elif isinstance(node, ast.Name):
        table, name, where = names.templates, node.id, ""
    else:
        raise scope.error(node, "ATL203", "only a helper, a pattern or a built-in function can be called")
    if name not in table:
        hint = suggest(name, [*table, *([] if where else known)])
        if not where and isinstance(scope.values.get(name), TensorParam):
            hint = f"`{name}` is a captured tensor: index it with `{name}[...]`"
        hint = FORMS.get(name, hint) if not where else hint
        raise scope.error(node, "ATL200", f"unknown function or pattern `{name[:80]}`{where}", hint)
    template = table[name]
    if template is None:
        raise Poisoned
    return template
