"""Mask functions as people write them for FlexAttention, traced and compared point by point."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import SHAPE, check_mask
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from attnlang import ir
from attnlang.tracing import trace

B, H, LQ, LK = SHAPE
Mask = Callable[..., Any]


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def window(size: int) -> Mask:
    return lambda b, h, q, k: (q - k <= size) & (k - q <= size)


def prefix(length: Any) -> Mask:
    return lambda b, h, q, k: k < length[b]


def document(ids: torch.Tensor) -> Mask:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ids[q] == ids[k]

    return mask


def natten(width: int, radius: int) -> Mask:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        qx, qy = q // width, q % width
        kx, ky = k // width, k % width
        return ((qx - kx).abs() <= radius) & ((qy - ky).abs() <= radius)

    return mask


def neighbourhood_clamped(width: int, kernel: int) -> Mask:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        x = torch.clamp(q % width, kernel // 2, width - 1 - kernel // 2)
        return torch.abs(x - k % width) <= kernel // 2

    return mask


def partial_offset(b: Any, h: Any, q: Any, k: Any, offset: int) -> Any:
    return q + offset >= k


def partial_first(lens: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q < lens[b]) & (k < lens[b])


def shared_prefix(ids: torch.Tensor, prefix_length: torch.Tensor, inner: Mask) -> Mask:
    """A mask within documents of packed sequences, in positions inside the document."""
    starts = torch.searchsorted(ids, torch.arange(int(ids.max()) + 1))

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        same = ids[q] == ids[k]
        local_q, local_k = q - starts[ids[q]], k - starts[ids[k]]
        return same & (inner(b, h, local_q, local_k) | (local_k < prefix_length[ids[q]]))

    return mask


class Windowed:
    """A callable object with a number and a tensor."""

    def __init__(self, size: int, lengths: torch.Tensor) -> None:
        self.size = size
        self.lengths = lengths

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k < self.size) & (k < self.lengths[b])

    def method(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k > self.size


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gap = 2
        self.register_buffer("ids", torch.tensor([0, 0, 1, 1, 2, 2, 2]))

    def forward(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (self.ids[q] == self.ids[k]) & (q - k < self.gap)


def _ids() -> torch.Tensor:
    return torch.tensor([0, 0, 0, 1, 1, 2, 2])


MASKS: dict[str, Mask] = {
    "causal": causal,
    "inverse causal": lambda b, h, q, k: q <= k,
    "negated causal": lambda b, h, q, k: -q <= -k,
    "window": window(2),
    "causal window": and_masks(causal, window(2)),
    "or": or_masks(causal, window(1)),
    "nested": or_masks(and_masks(causal, window(2)), lambda b, h, q, k: k == 0),
    "padded": prefix(torch.tensor([3, 7])),
    "prefix lm": or_masks(causal, prefix(torch.tensor([4, 1]))),
    "document": document(_ids()),
    "document causal": and_masks(causal, document(_ids().to(torch.int32))),
    "natten": natten(3, 1),
    "natten clamped": neighbourhood_clamped(7, 3),
    "partial keyword": functools.partial(partial_offset, offset=2),
    "partial tensor": functools.partial(partial_offset, offset=torch.tensor(1)),
    "partial positional": functools.partial(partial_first, torch.tensor([2, 5])),
    "default": lambda b, h, q, k, size=3: q - k < size,
    "callable": Windowed(3, torch.tensor([6, 2])),
    "method": Windowed(1, torch.tensor([6, 2])).method,
    "module": Module(),
    "batch flip": lambda b, h, q, k: torch.where(b % 2 == 0, q >= k, q <= k),
    "not captured": (lambda r: lambda b, h, q, k: ~r[b, q])(torch.rand(B, LQ) > 0.5),
    "tail": lambda b, h, q, k: k >= 5,
    "empty rows": lambda b, h, q, k: q < 3,
    "two bands": lambda b, h, q, k: (k < 2) | (k >= 5),
    "per head": (lambda w: lambda b, h, q, k: (q - k).abs() <= w[h])(torch.arange(H)),
    "dilated": lambda b, h, q, k: ((q - k) % 2 == 0) & ((q - k).abs() <= 4),
    "block diagonal": lambda b, h, q, k: torch.div(q, 3, rounding_mode="floor") == (k // 3),
    "xor": lambda b, h, q, k: ((q ^ k) & 1) == 0,
    "shifts": lambda b, h, q, k: (q >> 1) == (k >> 1),
    "left shift": lambda b, h, q, k: (k << 1) <= q,
    "bool tables": (lambda g: lambda b, h, q, k: g[q] | g[k])(torch.tensor([1, 0, 0, 0, 1, 0, 0]).bool()),
    "dense": (lambda m: lambda b, h, q, k: m[b, 0, q, k])(torch.rand(B, 1, LQ, LK) > 0.5),
    "ids": (lambda ids: lambda b, h, q, k: (ids[b, q] != -1) & (ids[b, q] == ids[b, k]))(
        torch.randint(-1, 2, (B, LK), generator=torch.Generator().manual_seed(1))
    ),
    "sinks": (lambda sinks: lambda b, h, q, k: (k == sinks).any() | (q >= k))(torch.tensor([1, 5])),
    "stairs": lambda b, h, q, k: torch.all(torch.stack([q >= k, q - k < 4])),
    "scalar tensor": lambda b, h, q, k: q - k < torch.scalar_tensor(3),
    "tensor": lambda b, h, q, k: q * torch.tensor(2) >= k,
    "logical": lambda b, h, q, k: torch.logical_or(torch.logical_not(q >= k), torch.logical_xor(q > 2, k > 3)),
    "always": lambda b, h, q, k: b.new_ones((), dtype=torch.bool),
    "ones like": lambda b, h, q, k: torch.ones_like(q, dtype=torch.bool),
    "from bool": lambda b, h, q, k: (q > 2) == (k > 2),
    "cast": lambda b, h, q, k: (q - k).bool(),
    "shared prefix": shared_prefix(_ids(), torch.tensor([1, 2, 0]), causal),
    "ragged": (lambda off, seq: lambda b, h, q, k: (q - off[seq[q]]) >= (k - off[seq[k]]))(
        torch.tensor([0, 3, 5]), _ids()
    ),
    "clamped document": (lambda ids: lambda b, h, q, k: ids[q.clamp(0, 4)] == ids[torch.clamp(k, max=3)])(_ids()),
    "torch.compile": torch.compile(causal),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_equals_its_function_everywhere(name: str) -> None:
    check_mask(MASKS[name])


def test_torch_noop_is_no_mask() -> None:
    assert trace(noop_mask).program.mask is ir.build.TRUE


def test_numbers_become_runtime_scalars_by_their_names() -> None:
    traced = check_mask(functools.partial(partial_offset, offset=2))
    assert traced.scalars == {"offset": 2}
    assert traced.program.scalar("offset").type is ir.INT
    assert check_mask(window(3)).scalars == {"size": 3}
    assert check_mask(Windowed(3, torch.tensor([6, 2]))).scalars == {"size": 3}
    assert check_mask(and_masks(window(1), window(2))).scalars == {"size": 1, "size_1": 2}


def test_captured_tensors_keep_their_names() -> None:
    traced = trace(shared_prefix(_ids(), torch.tensor([1, 2, 0]), causal))
    assert set(traced.tensors) == {"ids", "starts", "prefix_length"}
    assert set(trace(Module()).tensors) == {"ids"}
    assert traced.derived == ()


def test_global_names_and_collisions() -> None:
    table = torch.arange(7)

    def first(b: Any, h: Any, q: Any, k: Any) -> Any:
        return table[q] > k

    def second(table: torch.Tensor) -> Mask:
        return lambda b, h, q, k: table[k] > 3

    traced = check_mask(and_masks(first, second(torch.arange(7) + 1)))
    assert set(traced.tensors) == {"table", "table_1"}


def test_a_number_named_like_an_index_is_renamed() -> None:
    H = 3
    traced = check_mask(lambda b, h, q, k: q < H)
    assert traced.scalars == {"c_H": 3}


def test_namespace_objects() -> None:
    config = types.SimpleNamespace(window=2, name="local")
    traced = check_mask(lambda b, h, q, k: q - k <= config.window)
    assert traced.scalars == {"window": 2}
