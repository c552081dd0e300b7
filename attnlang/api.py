"""The public functions: programs in, callables out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from attnlang.ir import (
    FLOAT,
    OUTPUT_NAMES,
    Load,
    Program,
    Scalar,
    UsageError,
    digest,
    format_program,
    postorder,
    verify,
)
from attnlang.ir import reference as evaluate_dense
from attnlang.passes.learned import learnable, only_in_masks, with_captured_numbers
from attnlang.passes.specialise import specialise
from attnlang.runtime import dispatch, layouts
from attnlang.runtime.bind import Binder, Bound, check_scalar, suggest
from attnlang.runtime.call import Call
from attnlang.runtime.elements import for_elements
from attnlang.runtime.op import Site, attend, register
from attnlang.runtime.op_run import run
from attnlang.runtime.opaque import opaque
from attnlang.runtime.runs import run_maps

if TYPE_CHECKING:
    from attnlang.grammar import Module
    from attnlang.sparsity import Layout, Report, RunMap
    from attnlang.tracing import Traced

__all__ = ["Attention", "compile", "load", "load_all", "parse", "reference"]

Tensor = torch.Tensor
LayoutChoice: TypeAlias = "Layout | str | Tensor | tuple[Tensor, Tensor] | None"


def _pick(module: Module, pattern: str | None) -> Program:
    if pattern is None:
        return module.default
    if pattern not in module.patterns:
        raise UsageError(f"{module.filename} has no pattern {pattern!r}{suggest(pattern, module.patterns)}")
    return module.patterns[pattern]


def _keep_tables() -> None:
    from attnlang.grammar.parser import keep_tables
    from attnlang.runtime.cache import default_root

    keep_tables(default_root())


def parse(text: str, pattern: str | None = None) -> Program:
    """Return the last pattern of ``.attn`` text, or the one named ``pattern``.

    Raises:
        ProgramError: with line, column and a suggestion.
    """
    from attnlang.grammar import parse as parse_text

    _keep_tables()
    return _pick(parse_text(text), pattern)


def load(path: str | Path, pattern: str | None = None) -> Program:
    """Return the last pattern of an ``.attn`` file, or the one named ``pattern``.

    Raises:
        ProgramError: the file cannot be read, or with line, column and a suggestion.
    """
    from attnlang.grammar import load as load_file

    _keep_tables()
    return _pick(load_file(path), pattern)


def load_all(path: str | Path) -> dict[str, Program]:
    """Return every pattern that an ``.attn`` file defines, by name and in order.

    Raises:
        ProgramError: the file cannot be read, or with line, column and a suggestion.
    """
    from attnlang.grammar import load as load_file

    _keep_tables()
    return dict(load_file(path).patterns)


def compile(
    program: Program | Traced, *, backend: str | None = None, layout: LayoutChoice = None, **static: Scalar
) -> Attention:
    """Make a program callable.

    ``backend`` is ``"cpp"``, ``"triton"`` or ``"eager"``; None chooses by the device of the tensors. ``static`` gives
    values to parameters that are fixed from here on. Kernels are built when first called and then kept, in memory and
    on disk.

    ``layout`` puts the tokens in another order inside every call, so that more tiles are empty: ``"auto"`` lets the
    compiler choose for the lengths of the call, a text such as ``"8x8"``, ``"8x1%2"`` or ``"hilbert"`` names an order
    of the program's grid, and a :class:`attnlang.sparsity.Layout`, or int tensors [tokens] or [heads, tokens] (one, or
    a pair for queries and keys), gives it. Arguments, captured tensors and results stay in the caller's order.

    Raises:
        UsageError: unknown backend or parameter, a static parameter without value, or an order that is none.
        ProgramError: the program is not valid.
    """
    return Attention(program, backend=backend, layout=layout, **static)


class Attention:
    """A compiled program: call it with q, k and v."""

    def __init__(
        self,
        program: Program | Traced,
        *,
        backend: str | None = None,
        layout: LayoutChoice = None,
        **static: Scalar,
    ) -> None:
        self.backend = dispatch.check_backend(backend)
        self.layout = _checked_layout(layout)
        source, self._defaults = _unpack(program)
        self.program = specialise(verify(source), _checked_static(source, static))
        self._defaults = {n: v for n, v in self._defaults.items() if n not in static}
        self._binder = Binder(self.program)
        self._float_names = frozenset(p.name for p in self.program.scalars if p.type is FLOAT)
        self._learnable = learnable(self.program)
        self._only_in_masks = only_in_masks(self.program)
        self._learning = self._with_captured_numbers() if self._learnable else None
        self._enter_graphs()

    def _with_captured_numbers(self) -> Attention:
        """The same attention with every learnable float parameter as a captured 0-d tensor."""
        other = Attention(
            with_captured_numbers(self.program, self._learnable), backend=self.backend, layout=self.layout
        )
        other._defaults = self._defaults
        return other

    def _enter_graphs(self) -> None:
        """Get a handle by which graphs that PyTorch captures can refer to this program."""
        self._standard = self.program.standard
        self._results = self.program.results
        self._site = Site(self.program, self._binder, self.backend, self.layout)
        self._handle = register(self._site)
        self._tensor_names = tuple(t.name for t in self.program.tensors)
        self._given = {p.name: p.default for p in self.program.scalars if p.default is not None} | dict(self._defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {n: x for n, x in vars(self).items() if n not in ("_site", "_handle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._enter_graphs()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool = False,
        return_aux: bool = False,
        scale: float | None = None,
        backend: str | None = None,
        **captured: Any,
    ) -> Any:
        """Return attention of q [B, H, Lq, D] over k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv], as [B, H, Lq, Dv].

        ``captured`` gives captured tensors and scalar parameters by name. With ``return_lse`` the result is (o, lse),
        lse [B, H, Lq] the natural logarithm in float32. A row without visible keys gives 0 and -inf. With
        ``return_aux`` the last item of the result is a dict of every other output the program declares; a program
        without an output ``o`` always returns that dict alone. Differentiable in q, k, v and every float captured
        tensor. A float parameter that no mask reads may be a 0-d tensor, and is then differentiable, too.

        Raises:
            UsageError: an argument does not fit the program.
            Unavailable: ``backend`` was named and cannot run here.
        """
        if self._only_in_masks and torch.is_grad_enabled():
            self._refuse_gradients_of_masks(captured)
        if any(isinstance(captured.get(name), Tensor) for name in self._float_names):
            learning, captured = self._numbers_captured(captured, q)
            return learning(
                q, k, v, return_lse=return_lse, return_aux=return_aux, scale=scale, backend=backend, **captured
            )
        if torch.compiler.is_compiling():
            made = self._captured_call(q, k, v, scale, captured)
        else:
            made = self._eager_call(q, k, v, scale, backend, captured)
        return _arrange(self.program.name, made, return_lse, return_aux)

    def _refuse_gradients_of_masks(self, captured: dict[str, Any]) -> None:
        for name in self._only_in_masks:
            x = captured.get(name, self._defaults.get(name))
            if isinstance(x, Tensor) and x.requires_grad:
                raise UsageError(
                    f"{name} wants a gradient, but only the mask of {self.program.name} reads it, and hiding a pair "
                    f"has none. Pass {name}.detach(), or learn it straight through: keep the hard mask and let the "
                    "score read it too, as a soft copy of the mask (where it says x > 0, add log(sigmoid(x)))"
                )

    def _numbers_captured(self, captured: dict[str, Any], q: Tensor) -> tuple[Attention, dict[str, Any]]:
        """The attention and the arguments for a call that gives tensors for float parameters."""
        for name in self._float_names - self._learnable:
            if isinstance(captured.get(name), Tensor):
                raise UsageError(
                    f"parameter {name!r} of {self.program.name} cannot be a tensor: the mask reads it, and hiding a "
                    "pair has no gradient. Pass a Python float (.item()), or let the score fade pairs out, with the "
                    "mask behind the point where their weight is 0"
                )
        assert self._learning is not None
        numbers = {}
        for name in self._learnable:
            x = captured.get(name, self._given.get(name))
            if x is not None and not isinstance(x, Tensor):
                x = torch.tensor(check_scalar(self.program.name, self.program.scalar(name), x), device=q.device)
            if x is not None:
                numbers[name] = x
        return self._learning, {**captured, **numbers}

    @opaque
    def _eager_call(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str | None, captured: dict[str, Any]
    ) -> dict[str, Tensor]:
        bound = self._binder.bind(q, k, v, captured, self._defaults, scale)
        chosen = dispatch.check_backend(backend) or self.backend

        def run(here: Bound) -> tuple[Tensor, ...]:
            return self._results_of(layouts.run(self._call(here), self.layout, chosen))

        return dict(zip(self._results, for_elements(run, bound), strict=True))

    def _results_of(self, made: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(made[name] for name in self._results)

    def _captured_call(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, captured: dict[str, Any]
    ) -> dict[str, Tensor]:
        """One opaque node for ``torch.compile``, which traces this function: plain Python only."""
        given = {**self._given, **captured}
        for name in (*self._tensor_names, *self._site.ints, *self._site.floats):
            if name not in given:
                raise UsageError(f"{self.program.name} needs {name!r}")
        for name in captured:
            if name not in self._tensor_names and name not in self._site.ints and name not in self._site.floats:
                raise UsageError(f"{self.program.name} has no parameter {name!r}")
        tensors = [given[name] for name in self._tensor_names]
        ints = [given[name] for name in self._site.ints]
        floats = [given[name] for name in self._site.floats]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        call = attend if self._standard else run
        return dict(zip(self._results, call(q, k, v, tensors, ints, floats, scale, self._handle), strict=True))

    def _call(self, bound: Bound) -> Call:
        return self._site.bound_call(bound)

    def run_map(
        self,
        B: int,
        H: int,
        Lq: int,
        Lk: int,
        *,
        Hkv: int | None = None,
        tile: tuple[int, int] = (128, 128),
        **captured: Any,
    ) -> RunMap:
        """Return which tiles are empty, full and partial at these lengths, in the order of the layout if there is one.

        Raises:
            UsageError: a negative length, or a captured tensor, a parameter or the layout does not fit.
        """
        _check_mask(self.program)
        sizes = {"B": B, "H": H, "Hkv": H if Hkv is None else Hkv, "Lq": Lq, "Lk": Lk}
        sizes, params, tensors = self._binder.bind_sizes(sizes, captured, self._defaults)
        layout = layouts.choose(self.program, sizes, params, tensors, self.layout)
        if layout is None:
            return run_maps.provider(self.program, sizes, params, tensors)(tile)
        from attnlang.sparsity import analyse

        return analyse(self.program, sizes, params, tensors, tile, layout=layout)

    def layout_of(
        self, q_len: int, kv_len: int, *, B: int = 1, H: int = 1, Hkv: int | None = None, **captured: Any
    ) -> Layout | None:
        """Return the order of tokens that calls of these lengths use on a CPU, None for the order they come in.

        Raises:
            UsageError: a negative length, or a captured tensor, a parameter or the layout does not fit.
        """
        sizes = {"B": B, "H": H, "Hkv": H if Hkv is None else Hkv, "Lq": q_len, "Lk": kv_len}
        sizes, params, tensors = self._binder.bind_sizes(sizes, captured, self._defaults)
        return layouts.choose(self.program, sizes, params, tensors, self.layout)

    def source(
        self, target: str = "cpu", head_dim: int = 64, value_dim: int | None = None, dtype: str = "float32"
    ) -> str:
        """Return the generated kernel as readable source.

        ``target``: ``"cpu"``, ``"cuda:80"``, ``"cuda:90"``, ``"cuda:100"`` or ``"hip:gfx942"``.

        Raises:
            UsageError: unknown target or dtype.
        """
        from attnlang.runtime.source import source

        width = head_dim if value_dim is None else value_dim
        return source(self.program, target, head_dim, width, dtype, self._storage())

    def sources(
        self, target: str = "cpu", head_dim: int = 64, value_dim: int | None = None, dtype: str = "float32"
    ) -> dict[str, str]:
        """Return the generated kernels of a program of several, by the stage or part of a stage they run.

        Parts whose kernels depend on what they are called with are not among them.

        Raises:
            UsageError: unknown target or dtype, or there is no such part.
        """
        from attnlang.runtime.source import sources

        width = head_dim if value_dim is None else value_dim
        return sources(self.program, target, head_dim, width, dtype, self._storage())

    def _storage(self) -> dict[str, str]:
        return {n: str(t.dtype).removeprefix("torch.") for n, t in self._defaults.items() if isinstance(t, Tensor)}

    def explain(
        self,
        q_len: int,
        kv_len: int,
        *,
        B: int = 1,
        H: int = 1,
        tile: tuple[int, int] = (128, 128),
        **captured: Any,
    ) -> Report:
        """Return a printable report: why tiles are empty, full or partial at these lengths, and what would help.

        Raises:
            UsageError: a negative length, or a captured tensor or parameter that does not fit.
        """
        from attnlang.sparsity import explain

        _check_mask(self.program)
        sizes = {"B": B, "H": H, "Hkv": H, "Lq": q_len, "Lk": kv_len}
        sizes, params, tensors = self._binder.bind_sizes(sizes, captured, self._defaults)
        layout = layouts.choose(self.program, sizes, params, tensors, self.layout)
        return explain(self.program, sizes, params, tensors, tile, layout=layout)

    def __repr__(self) -> str:
        where = f", backend={self.backend!r}" if self.backend else ""
        return f"Attention({digest(self.program)}{where})\n{format_program(self.program)}"


def reference(
    program: Program | Traced | Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = False,
    return_aux: bool = False,
    scale: float | None = None,
    **captured: Any,
) -> Any:
    """Return what the program means, evaluated densely in float64, in the arrangement of a call.

    Memory is O(B H Lq Lk). Raises what a call of the compiled program raises.
    """
    attention = program if isinstance(program, Attention) else Attention(program)
    bound = attention._binder.bind(q, k, v, captured, attention._defaults, scale)

    def run(here: Bound) -> tuple[Tensor, ...]:
        program = attention.program
        made = evaluate_dense(program, here.q, here.k, here.v, here.sizes, here.params, here.tensors, here.scale)
        return attention._results_of(made)

    made = dict(zip(attention._results, for_elements(run, bound), strict=True))
    return _arrange(attention.program.name, made, return_lse, return_aux)


def _arrange(program: str, made: dict[str, Tensor], return_lse: bool, return_aux: bool) -> Any:
    """The results of a call in the form it was asked for."""
    if "o" not in made:
        return made
    if return_lse and "lse" not in made:
        raise UsageError(f"{program} has no lse: declare it as an output, or leave return_lse out")
    found: list[Any] = [made["o"], made["lse"]] if return_lse else [made["o"]]
    if return_aux:
        found.append({name: t for name, t in made.items() if name not in OUTPUT_NAMES})
    return tuple(found) if len(found) > 1 else found[0]


def _unpack(program: Program | Traced) -> tuple[Program, Mapping[str, Any]]:
    """Split what may be compiled into a program and the values it was traced with."""
    if isinstance(program, Program):
        return program, {}
    inner = getattr(program, "program", None)
    if not isinstance(inner, Program):
        kind = type(program).__name__
        hint = "; trace Python functions with attnlang.program(mask=..., score=...)" if callable(program) else ""
        raise UsageError(f"expected a program, got {kind}{hint}")
    return inner, {**program.tensors, **program.scalars}


def _check_mask(program: Program) -> None:
    """Refuse to look at a mask that is known in a call only."""
    given = {t.name for t in program.tensors}
    for node in postorder(program.mask):
        if isinstance(node, Load) and node.tensor not in given:
            raise UsageError(
                f"the mask of {program.name} reads {node.tensor!r}, which a stage of it makes: "
                "which tiles are computed is known in a call only"
            )


def _checked_layout(layout: LayoutChoice) -> Layout | str | None:
    if layout is None or isinstance(layout, str):
        return layout
    from attnlang.sparsity import Layout

    if isinstance(layout, Layout):
        return layout
    pair = tuple(layout) if isinstance(layout, tuple | list) else (layout,)
    if len(pair) not in (1, 2) or not all(isinstance(t, Tensor) for t in pair):
        kind = type(layout).__name__
        raise UsageError(f"layout must be a Layout, a text, an int tensor or a pair of int tensors, got {kind}")
    return Layout.given(*pair)


def _checked_static(program: Program, static: Mapping[str, Any]) -> dict[str, Scalar]:
    known = {p.name: p for p in program.scalars}
    for name in static:
        if name not in known:
            if any(t.name == name for t in program.tensors):
                raise UsageError(f"{name!r} is a captured tensor of {program.name}; pass it to the call")
            raise UsageError(f"{program.name} has no parameter {name!r}{suggest(name, known)}")
    return {name: check_scalar(program.name, known[name], value) for name, value in static.items()}
