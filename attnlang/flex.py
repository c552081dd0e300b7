"""FlexAttention's functions with PyTorch's signatures and meaning, compiled by attnlang.

Change the import and existing score and mask functions run: on the CPU too, with gradients, without ``torch.compile``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch

from attnlang.ir import INT, Const, Environment, Load, Program, Size, TensorParam, UsageError, evaluate
from attnlang.ir.build import TRUE, all_of, any_of, op
from attnlang.ir.build import b as axis_b
from attnlang.ir.build import h as axis_h
from attnlang.ir.build import k as axis_k
from attnlang.ir.build import q as axis_q
from attnlang.runtime import dispatch, eager
from attnlang.runtime.bind import Bound
from attnlang.runtime.elements import for_elements
from attnlang.runtime.opaque import opaque
from attnlang.sparsity import EMPTY, FULL, PARTIAL, RunMap
from attnlang.tracing import trace

from . import api
from .block_kinds import exact_runs
from .block_lists import RunBlocks, kinds_from_lists
from .block_mask import BlockMask, noop_mask, sliced_mask_error

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "not_mask",
    "or_masks",
]

Tensor = torch.Tensor
Mod: TypeAlias = Callable[..., Any]

KINDS = "block_kinds"
"""Name of the captured tensor that holds the block structure of a mask given by block lists."""
CACHED_PROGRAMS = 256
WHOLE = 1 << 30
"""Block size by which PyTorch marks a mask that is no mask."""


class AuxRequest(NamedTuple):
    """Which auxiliary outputs to return."""

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """Auxiliary outputs, [B, H, Lq] each: natural-log lse and largest modified score; None where not requested."""

    lse: Tensor | None = None
    max_scores: Tensor | None = None


class FlexNotImplementedError(UsageError, NotImplementedError):
    """Raised where PyTorch raises NotImplementedError."""


class FlexRuntimeError(UsageError, RuntimeError):
    """Raised where PyTorch raises RuntimeError."""


# --- mask functions from mask functions


def _check_mods(mods: tuple[Mod, ...]) -> None:
    if not all(callable(m) for m in mods):
        raise FlexRuntimeError(f"All inputs should be callable mask_mods: {mods}")


def or_masks(*mask_mods: Mod) -> Mod:
    """Return a mask function that is true where any of ``mask_mods`` is."""
    _check_mods(mask_mods)

    def or_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = b.new_zeros((), dtype=torch.bool)
        for mask in mask_mods:
            result = result | mask(b, h, q_idx, kv_idx)
        return result

    return or_mask


def and_masks(*mask_mods: Mod) -> Mod:
    """Return a mask function that is true where all of ``mask_mods`` are."""
    _check_mods(mask_mods)

    def and_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = b.new_ones((), dtype=torch.bool)
        for mask in mask_mods:
            result = result & mask(b, h, q_idx, kv_idx)
        return result

    return and_mask


def not_mask(mask_mod: Mod) -> Mod:
    """Return a mask function that is true where ``mask_mod`` is not."""
    _check_mods((mask_mod,))

    def inverted_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~mask_mod(b, h, q_idx, kv_idx)

    return inverted_mask


def _positional(mod: Mod) -> int:
    """Number of positional arguments without default."""
    try:
        parameters = inspect.signature(mod).parameters.values()
    except (TypeError, ValueError):
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(1 for p in parameters if p.default is p.empty and p.kind in kinds)


# --- programs of mods, remembered by structure


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def _attention(program: Program) -> api.Attention:
    """The compiled form of a traced program; equal programs share one."""
    return api.Attention(program)


def _traced(
    mask: Mod | None,
    score: Mod | None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Program, dict[str, Any]]:
    """Trace mods into a program and the values of its parameters."""
    mask = None if mask is noop_mask else mask
    if mask is None and score is None:
        return Program("flex_attention"), {}
    traced = trace(mask, score, name="flex_attention", device=device, dtype=dtype)
    return traced.program, {**traced.tensors, **traced.scalars}


def _restricted(program: Program, kinds: Tensor, block_size: tuple[int, int], batch: int, heads: int) -> Program:
    """Restrict the mask of ``program`` to a block structure; FULL blocks do not ask the mask.

    A structure of fewer batch elements or heads than the query repeats, as in PyTorch's kernels.
    """
    outer = [
        axis if have == want else Const(0, INT) if have == 1 else op("mod", axis, have)
        for axis, have, want in zip((axis_b, axis_h), kinds.shape, (batch, heads), strict=False)
    ]
    where = (*outer, op("floordiv", axis_q, block_size[0]), op("floordiv", axis_k, block_size[1]))
    kind = Load(KINDS, where, INT)
    mask = program.mask
    seen = any_of(op("eq", kind, FULL), all_of(op("eq", kind, PARTIAL), mask)) if mask is not TRUE else None
    seen = op("ne", kind, EMPTY) if seen is None else seen
    shape = tuple(Size(f"{KINDS}_{name}") for name in ("batch", "heads", "rows", "cols"))
    tensors = (*program.tensors, TensorParam(KINDS, INT, shape))
    return replace(program.with_hooks(mask=seen), tensors=tensors)


# --- block masks


@opaque
def create_block_mask(
    mask_mod: Mod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """Return the BlockMask of ``mask_mod(b, h, q_idx, kv_idx)``.

    Costs a trace of the function: nothing of size Q_LEN x KV_LEN is ever made, and the block lists only when read.
    ``B`` or ``H`` None means that the mask is shared. ``_compile``, ``compute_dq_write_order`` and ``dq_kv_order`` are
    accepted for compatibility and change nothing.

    Raises:
        UsageError: not a mask function, a negative length, or a block size below 1.
        ProgramError: the function cannot be compiled; the message names the line.
    """
    if _positional(mask_mod) != 4:
        raise UsageError(f"create_block_mask needs a mask_mod(b, h, q_idx, kv_idx), got {mask_mod!r}")
    size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else (BLOCK_SIZE[0], BLOCK_SIZE[1])
    if min(size) < 1:
        raise UsageError(f"BLOCK_SIZE must be at least 1, got {BLOCK_SIZE}")
    batch, heads = 1 if B is None else B, 1 if H is None else H
    for name, length in (("B", batch), ("H", heads), ("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN)):
        if length < 0:
            raise UsageError(f"{name} must not be negative, got {length}")
    where = None if device is None else torch.device(device)
    program, values = _traced(mask_mod, None, where)

    def make() -> RunBlocks:
        runs = exact_runs(_attention(program), values, (batch, heads, Q_LEN, KV_LEN), size)
        return RunBlocks(runs, (batch, heads), separate_full_blocks)

    def prove() -> RunMap:
        return _attention(program).run_map(batch, heads, Q_LEN, KV_LEN, tile=size, **values)

    return BlockMask.lazy(mask_mod, (batch, heads), (Q_LEN, KV_LEN), size, where, make, prove)


@opaque
def create_mask(mod_fn: Mod, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int, device: Any = None) -> Tensor:
    """Return the dense mask of a mask or score function, bool [B, H, Q_LEN, KV_LEN].

    A score function masks where it returns -inf for a score of 0.

    Raises:
        UsageError: a function of other than 4 or 5 arguments, or a negative length.
    """
    count = _positional(mod_fn)
    if count not in (4, 5):
        raise UsageError(f"create_mask needs a function of 4 or 5 positional arguments, got one of {count}")
    mask, score = (mod_fn, None) if count == 4 else (None, mod_fn)
    program, values = _traced(mask, score, None if device is None else torch.device(device))
    batch, heads = 1 if B is None else B, 1 if H is None else H
    attention = _attention(program)
    named = {"B": batch, "H": heads, "Hkv": heads, "Lq": Q_LEN, "Lk": KV_LEN}
    sizes, params, tensors = attention._binder.bind_sizes(named, values, attention._defaults)
    where = next((t.device for t in tensors.values()), torch.device("cpu"))
    shape = (batch, heads, Q_LEN, KV_LEN)
    axes = {
        axis: torch.arange(n, device=where).view([-1 if i == d else 1 for d in range(4)])
        for i, (axis, n) in enumerate(zip("bhqk", shape, strict=True))
    }
    env = Environment(axes, sizes, params, tensors, {"s": torch.zeros(shape, device=where)}, torch.float32, where)
    if count == 4:
        seen = evaluate(attention.program.mask, env)
    else:
        seen = ~torch.isneginf(evaluate(attention.program.score, env))
    out = seen.expand(shape).contiguous()
    return out if device is None else out.to(device)


# --- attention


@opaque
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """Attention with a score function and a block mask, as ``torch.nn.attention.flex_attention.flex_attention``.

    query [B, Hq, L, E], key [B, Hkv, S, E], value [B, Hkv, S, Ev]; ``block_mask`` is attnlang's or PyTorch's BlockMask.
    Returns the output [B, Hq, L, Ev]; with ``return_lse`` (output, lse), with ``return_aux`` (output, AuxOutput).
    ``kernel_options`` belong to another compiler's kernels and are ignored.

    Raises:
        UsageError: the arguments do not fit; the same conditions as in PyTorch, and also a ValueError,
            NotImplementedError or RuntimeError as there.
        ProgramError: a function cannot be compiled; the message names the line.
    """
    if return_lse and return_aux is not None:
        raise UsageError("Cannot specify both return_lse and return_aux; use return_aux=AuxRequest(lse=True)")
    query, key, value = _operands(query, key, value, enable_gqa, block_mask)
    mask, kinds = _mask_of(block_mask, query, key)
    program, values = _traced(mask, score_mod, query.device, eager.compute_dtype(query.dtype))
    if kinds is not None:
        program = _restricted(program, kinds, block_mask.BLOCK_SIZE, query.shape[0], query.shape[1])
        values[KINDS] = kinds.to(query.device)
    attention = _attention(program)
    bound = attention._binder.bind(query, key, value, values, None, scale)
    wants_top = return_aux is not None and return_aux.max_scores

    def run(here: Bound) -> tuple[Tensor, ...]:
        call = attention._call(here)
        return (*dispatch.attend(call), *([_max_scores(call)] if wants_top else []))

    out, lse, *top = for_elements(run, bound)
    if return_aux is not None:
        return out, AuxOutput(lse if return_aux.lse else None, top[0] if top else None)
    return (out, lse) if return_lse else out


def _max_scores(call: Any) -> Tensor:
    with torch.no_grad():
        top: Tensor = eager.forward_stats(call)[2]
    return top


def _operands(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, block_mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply PyTorch's checks in PyTorch's words, and its autocast."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise FlexNotImplementedError(
            "flex_attention does not support NestedTensor inputs. Convert inputs to dense tensors first, or pack them "
            "into one sequence with a captured document tensor."
        )
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise FlexNotImplementedError("NYI: query, key, and value must be 4D tensors")
    if not query.device == key.device == value.device:
        raise UsageError(
            "Expected query, key, and value to have the same device type, but got query.device: "
            f"{query.device}, key.device: {key.device}, and value.device: {value.device} instead."
        )
    if query.size(-1) != key.size(-1):
        raise UsageError(
            "Expect query and key/value to have the same embedding dimension "
            f"but got E={query.size(-1)} and E={key.size(-1)}."
        )
    hq, hkv = query.size(1), key.size(1)
    if not enable_gqa and hq != hkv:
        raise UsageError(
            f"Expect query and key/value to have the same number of heads but got Hq={hq} and Hkv={hkv}. "
            "Try setting enable_gqa=True for GQA."
        )
    if enable_gqa and hq and (not hkv or hq % hkv):
        raise UsageError(
            f"Expect number of query heads to be a multiple of kv heads for GQA but got Hq={hq} and Hkv={hkv}."
        )
    if query.size(0) != key.size(0):
        _check_batches(query.size(0), key.size(0), block_mask)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        cast = torch.get_autocast_dtype(kind)
        query, key, value = (t.to(cast) if t.dtype is not torch.float64 else t for t in (query, key, value))
    return query, key.to(query.dtype), value.to(query.dtype)


def _check_batches(bq: int, bkv: int, block_mask: Any) -> None:
    if block_mask is None:
        raise UsageError(
            "Expect query and key/value to have the same batch size, or non-none block_mask, "
            f"but got block_mask=None, Bq={bq}, and Bkv={bkv}."
        )
    if block_mask.shape[0] != bq:
        raise UsageError(
            "Expect query and key/value to have the same batch size, or block_mask and query to have the same batch "
            f"size, but got Bq={bq}, Bkv={bkv}, B_block_mask={block_mask.shape[0]}."
        )


def _mask_of(block_mask: Any, query: Tensor, key: Tensor) -> tuple[Mod | None, Tensor | None]:
    """Return the mask function of a block mask, and its block structure where that restricts the function."""
    if block_mask is None:
        return None, None
    for name in ("mask_mod", "BLOCK_SIZE", "kv_num_blocks", "shape") if not isinstance(block_mask, BlockMask) else ():
        if not hasattr(block_mask, name):
            raise UsageError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
    mod = block_mask.mask_mod
    if mod in (sliced_mask_error, _of_pytorch("_sliced_mask_mod_error")):
        raise FlexRuntimeError("Cannot use mask_mod from a sliced BlockMask")
    ours = isinstance(block_mask, BlockMask)
    size = block_mask.BLOCK_SIZE
    if not (size[0] == WHOLE and size[1] == WHOLE):
        _check_lengths(block_mask, query.size(-2), key.size(-2))
    device = block_mask.device if ours else block_mask.kv_num_blocks.device
    if device is not None and device.type != query.device.type:
        raise FlexRuntimeError(
            f"Expect q/k/v and block_mask to be on the same device but got {query.device} and {device}."
        )
    mod = None if mod is _of_pytorch("noop_mask") else mod
    if ours:
        return mod, (_four_dimensional(block_mask.kinds()) if block_mask.structured else None)
    if size[0] == WHOLE and size[1] == WHOLE:
        return mod, None
    return mod, _four_dimensional(kinds_from_lists(block_mask))


def _of_pytorch(name: str) -> Any:
    """A function of PyTorch's own FlexAttention if that has been imported; a BlockMask of it can only exist then."""
    return getattr(sys.modules.get("torch.nn.attention.flex_attention"), name, None)


def _four_dimensional(kinds: Tensor) -> Tensor:
    return kinds.reshape((1,) * (4 - kinds.dim()) + tuple(kinds.shape))


def _check_lengths(block_mask: Any, q_len: int, kv_len: int) -> None:
    mask_q, mask_kv = block_mask.shape[-2:]
    if (mask_q, mask_kv) == (q_len, kv_len):
        return
    smaller = q_len > mask_q or kv_len > mask_kv
    advice = (
        "As the block mask was created for a smaller length than you're using it for, you likely need to create a new "
        "block mask."
        if smaller
        else "As the block mask was created for a larger length than you're using it for, you can either 1. create a "
        "new block mask with the correct length, or 2. 'adjust' the existing block mask to the correct length by "
        "calling block_mask._adjust(q_len, kv_len), which crops it to the upper left corner."
    )
    raise UsageError(
        f"block_mask was created for block_mask.shape={block_mask.shape} but got q_len={q_len} and kv_len={kv_len}. "
        + advice
    )
