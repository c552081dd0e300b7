"""Base of the expression printers: how a plan's expressions become text is a table per target.

A printer is asked for the text of a node *as used at a level*. A node that the plan made a statement is printed as a
reference to its name; anything else is printed in place. Targets differ in their operator table, their leaves, their
loads and in what it takes to use a row or column value at pair level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from attnlang.ir import Const, Expr, Index, Input, Load, Op, Param, Size
from attnlang.passes.levels import Level
from attnlang.passes.widths import Width

from .facts import Facts
from .plan_parts import Value

__all__ = ["Plan", "Printer"]

Plan = TypeVar("Plan", bound=Facts)


class Printer(Generic[Plan]):
    """Prints the expressions of one plan. Subclasses provide the target's tables and leaves."""

    formats: Mapping[str, str] = {}
    """Operator name to a format string with ``{0} {1} {2}`` for the arguments."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def text(self, node: Expr, at: Level) -> str:
        """Return the text of ``node`` as an operand of an expression at level ``at``."""
        if node in self.plan.names:
            return self.reference(node, self.plan.names[node], at)
        return self.definition(node, at)

    def definition(self, node: Expr, at: Level) -> str:
        """Return the text that computes ``node`` at level ``at`` from its arguments."""
        match node:
            case Const():
                return self.constant(node, at)
            case Index():
                return self.index(node, at)
            case Size(name=name):
                return self.size(name, at)
            case Param():
                return self.parameter(node, at)
            case Input():
                return self.input(node, at)
            case Load():
                return self.load(node, at)
            case Op():
                return self.operation(node, at)
        raise TypeError(f"cannot print a {type(node).__name__}")

    def value(self, value: Value) -> str:
        """Return the right-hand side of the statement for ``value``."""
        return self.definition(value.expr, value.level)

    def operation(self, node: Op, at: Level) -> str:
        """Print an operator from the table; subclasses handle the ones that need proofs first."""
        return self.formats[node.op].format(*(self.argument(node, a, at) for a in node.args))

    def argument(self, user: Op, arg: Expr, at: Level) -> str:
        """Print ``arg`` for ``user``, converted to the width the operation is done in."""
        text = self.text(arg, at)
        want = self.operand_width(user, arg)
        have = self.plan.width(arg)
        return text if want is have else self.convert(text, have, want, at)

    def operand_width(self, user: Op, arg: Expr) -> Width:
        """Width ``arg`` must have inside ``user``: int operands and an int result share the widest of them."""
        have = self.plan.width(arg)
        ints = [self.plan.width(a) for a in user.args if self.plan.width(a) in (Width.I32, Width.I64)]
        ints += [w for w in (self.plan.width(user),) if w in (Width.I32, Width.I64) and user.op != "to_int"]
        if have is Width.I32 and Width.I64 in ints:
            return Width.I64
        return have

    # what a target provides

    def reference(self, node: Expr, name: str, at: Level) -> str:
        raise NotImplementedError

    def constant(self, node: Const, at: Level) -> str:
        raise NotImplementedError

    def index(self, node: Index, at: Level) -> str:
        raise NotImplementedError

    def size(self, name: str, at: Level) -> str:
        raise NotImplementedError

    def parameter(self, node: Param, at: Level) -> str:
        raise NotImplementedError

    def input(self, node: Input, at: Level) -> str:
        raise NotImplementedError

    def load(self, node: Load, at: Level) -> str:
        raise NotImplementedError

    def convert(self, text: str, have: Width, want: Width, at: Level) -> str:
        raise NotImplementedError
