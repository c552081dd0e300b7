"""Names and parameters of the two backward kernels on the Triton target."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from attnlang.ir import FLOAT
from attnlang.passes.levels import Level

from .plan import CapturedGrad, KernelPlan, TensorArg
from .scatter import scatter_of
from .triton_common import KNOWN_SIZES, RUN_TABLE
from .triton_printer import safe_name
from .triton_runs import table_arguments

__all__ = [
    "KEYS",
    "LOOP",
    "QUERIES",
    "SCATTERED",
    "BackwardArguments",
    "Parameters",
    "backward_arguments",
    "belongs",
    "has_diagonals",
    "kernel_name",
    "kind_of",
    "own_name",
    "rename",
]

QUERIES, KEYS = "queries", "keys"
LOOP = {QUERIES: "k", KEYS: "q"}
"""Axis of the inner loop of each kernel."""

_OWN_NAMES = """
attention_backward_keys attention_backward_queries base delta delta_ptr dk dk_base dk_inside dk_offsets dk_ptr dk_to
dlogit dlse dlse_ptr do do_base do_offsets do_ptr dp dq dq_base dq_inside dq_offsets dq_ptr dq_to ds dv dv_base
dv_inside dv_offsets dv_ptr dv_to group high high_mask high_sum key_inside low low_sum member num_k_tiles p place row
seen shares skew start_k tile_k turn turned wraps
"""
_CLASHES = re.compile(
    rf"(?<![\w.])({'|'.join(_OWN_NAMES.split())}"
    r"|(?:q|k|v|o|do|dq|dk|dv)_stride_[bhnd]|grad\d+(?:_ptr|_sum|_to|_at|_part|_unit|_place|_low|_high|_bucket|_element|_stride(?:\d+|_[bh]))?)(?!\w)"
)
"""Names of the backward templates that the forward template does not have."""


def own_name(name: str) -> bool:
    """Whether the backward templates use ``name`` for themselves, beside the names of the forward template."""
    return _CLASHES.fullmatch(name) is not None


def rename(text: str) -> str:
    """Add an underscore to names of the program that a backward template uses for itself."""
    return _CLASHES.sub(r"\1_", text)


def kind_of(grad: CapturedGrad) -> str:
    """Return how a captured gradient is added up: row, grid, col or a value of :class:`Scatter`."""
    return scatter_of(grad.load, grad.derivative).value if grad.level is Level.PAIR else grad.level.value


def belongs(grad: CapturedGrad, kernel: str) -> bool:
    """Whether ``kernel`` is the one that sums a captured gradient."""
    return (grad.level is Level.COL) == (kernel == KEYS)


@dataclass(frozen=True)
class BackwardArguments:
    """Parameters of one backward kernel and of its ``launch``.

    ``call`` holds the host expression for each kernel parameter, ``loose`` the parameters that are not specialised on
    their value; ``types`` the element types of pointers and floats, ``last`` the strides that are usually 1.
    """

    kernel: tuple[str, ...]
    host: tuple[str, ...]
    call: tuple[str, ...]
    loose: tuple[str, ...]
    types: dict[str, str]
    last: frozenset[str]


SCATTERED = ("store", "fixed", "rows", "atomic")
"""Kinds of gradients whose buffers have the shape of the tensor."""


def has_diagonals(plan: KernelPlan) -> bool:
    """Whether the queries kernel sums gradients along diagonals."""
    return any(g.level is Level.PAIR and scatter_of(g.load, g.derivative).is_diagonal for g in plan.grads)


def kernel_name(kernel: str) -> str:
    """Return the name of the Triton function of the ``queries`` or the ``keys`` kernel."""
    return f"attention_backward_{kernel}"


class Parameters:
    """Collects the parameters of a kernel in order."""

    def __init__(self) -> None:
        self.kernel: dict[str, str] = {}
        self.host: list[str] = []
        self.loose: list[str] = []
        self.types: dict[str, str] = {}
        self.last: set[str] = set()

    def add(self, name: str, text: str = "", type: str = "", *, loose: bool = False) -> None:
        """Add a kernel parameter that ``launch`` fills with ``text``; ``type`` as in ``BackwardArguments``."""
        self.kernel[name] = text or name
        self.loose += [name] if loose else []
        self.types |= {name: type} if type else {}

    def operands(self, types: dict[str, str], rows: tuple[str, ...]) -> None:
        """Add tensors; ``rows`` are those [B, H, L, D] with strides."""
        self.host += types
        for name, type_ in types.items():
            self.add(f"{name}_ptr", name, type_)
        for name in rows:
            for d, axis in enumerate("bhnd"):
                self.add(f"{name}_stride_{axis}", f"{name}.stride({d})")
        self.last |= {f"{name}_stride_d" for name in rows}

    def captured(self, tensor: TensorArg) -> None:
        """Add a captured tensor."""
        name = safe_name(tensor.name)
        own = rename(name)
        self.host.append(own)
        self.add(rename(f"{name}_ptr"), own, tensor.dtype)
        for d in range(tensor.rank):
            self.add(rename(f"{name}_stride{d}"), f"{own}.stride({d})")
        for d in range(tensor.rank):
            self.add(rename(f"{name}_size{d}"), f"{own}.size({d})", loose=True)
        self.last |= {rename(f"{name}_stride{tensor.rank - 1}")} if tensor.rank else set()

    def gradient(self, name: str, kind: str, rank: int) -> None:
        """Add the buffer of a captured gradient; one that is scattered to is [batch or 1, heads or 1, *shape]."""
        self.host.append(name)
        self.add(f"{name}_ptr", name, "int64" if kind == "fixed" else "float32")
        if kind == "fixed":
            self.host.append(f"{name}_unit")
            self.add(f"{name}_unit", type="float32")
        if kind not in SCATTERED:
            return
        for d, axis in enumerate("bh"):
            self.add(f"{name}_stride_{axis}", f"{name}.stride({d}) if {name}.shape[{d}] > 1 else 0", loose=True)
        for d in range(rank):
            self.add(f"{name}_stride{d}", f"{name}.stride({d + 2})", loose=True)

    def numbers(self, names: Iterable[str]) -> None:
        """Add float32 vectors of a number for each row or key, by names that no name of a program can be."""
        for name in names:
            self.host.append(f"{name}_")
            self.add(f"{name}_ptr_", f"{name}_", "float32")

    def rest(self, plan: KernelPlan, kernel: str) -> None:
        """Add what follows the tensors of either kind of backward plan."""
        self.host.append("scale")
        self.add("scale", type="float", loose=True)
        for tensor in plan.tensors:
            self.captured(tensor)
        for param in plan.scalars:
            name = rename(safe_name(param.name))
            self.host.append(name)
            self.add(name, type="float" if param.type is FLOAT else "", loose=True)
        for size in dict.fromkeys(("H", "Hkv", "Lq", "Lk", *plan.sizes)):
            name = rename(safe_name(size))
            self.host += [] if size in KNOWN_SIZES else [name]
            self.add(name, KNOWN_SIZES.get(size, name), loose=True)
        for i, grad in enumerate((*plan.grads, *plan.feature_grads)):
            if belongs(grad, kernel):
                self.gradient(f"grad{i}", kind_of(grad), len(grad.load.indices))
        if kernel == QUERIES and has_diagonals(plan):
            self.host.append("shares")
            self.add("shares", loose=True)
        table = table_arguments(plan, LOOP[kernel])
        self.host += table
        for name in table:
            self.add(name, type="int32" if name in RUN_TABLE[:4] else "", loose=name in RUN_TABLE[4:])

    def arguments(self) -> BackwardArguments:
        """What was collected."""
        names, texts = tuple(self.kernel), tuple(self.kernel.values())
        return BackwardArguments(names, tuple(self.host), texts, tuple(self.loose), self.types, frozenset(self.last))


def backward_arguments(plan: KernelPlan, kernel: str) -> BackwardArguments:
    """Return the parameters of the ``queries`` or ``keys`` kernel of a backward plan.

    ``launch`` takes the tensors, scale, captured tensors, scalars, sizes the shapes of q and k do not give, the buffers
    of the captured gradients of this kernel, ``shares`` where sums along diagonals are private to a share of the
    queries, and the run table.
    """
    made = Parameters()
    rows = ("q", "k", "v", "do", *(("o", "dq") if kernel == QUERIES else ("dk", "dv")))
    flat = ("lse", "delta", "dlse") if kernel == QUERIES else ("lse", "delta")
    made.operands(dict.fromkeys(rows, plan.dtype) | dict.fromkeys(flat, "float32"), rows)
    made.rest(plan, kernel)
    return made.arguments()
