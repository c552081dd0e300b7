"""Captured tensors on a device: the analysis waits for the device once, whatever the mask reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from attnlang.ir import BOOL, FLOAT, INT, Load, Param, Program, ScalarParam, Size, TensorParam, simple
from attnlang.ir.build import all_of, any_of, b, h, k, op, q
from attnlang.sparsity import analyse
from attnlang.sparsity.transfer import to_host


class Far(torch.Tensor):
    """A stand-in for a tensor on a GPU: whatever makes the host wait for its numbers is counted."""

    waits = 0

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        device = torch.device("meta")  # a device whose library is not needed
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device=device
        )

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        args = tree_map(lambda t: t.near if isinstance(t, Far) else t, args)
        out = func(*args, **kwargs)
        if "_local_scalar_dense" in str(func) or torch.device(kwargs.get("device") or "meta").type == "cpu":
            Far.waits += 1
            return out
        return tree_map(lambda t: Far(t) if isinstance(t, torch.Tensor) else t, out)


@pytest.fixture(autouse=True)
def _count() -> None:
    Far.waits = 0


def reading_everything() -> tuple[Program, dict[str, torch.Tensor], dict[str, int]]:
    declared = (
        TensorParam("doc", INT, (Size("B"), Size("Lk"))),
        TensorParam("flag", BOOL, (Size("Lk"),)),
        TensorParam("gate", FLOAT, (Size("H"),)),
        TensorParam("length", INT, ()),
        TensorParam("bias", FLOAT, (Size("Lq"), Size("Lk"))),
    )
    same = op("eq", Load("doc", (b, q), INT), Load("doc", (b, k), INT))
    mask = all_of(
        any_of(same, Load("flag", (k,), BOOL)),
        op("gt", Load("gate", (h,), FLOAT), 0.0),
        op("lt", k, Load("length", (), INT)),
        op("le", op("sub", q, k), Param("window", INT)),
    )
    score = op("add", Load("bias", (q, k), FLOAT), 0.0)
    program = simple("all", mask=mask, score=score, scalars=(ScalarParam("window", INT),), tensors=declared)
    g = torch.Generator().manual_seed(0)
    tensors = {
        "doc": torch.sort(torch.randint(0, 5, (2, 301), generator=g).int()).values,
        "flag": torch.rand(301, generator=g) < 0.02,
        "gate": torch.tensor([1.0, -1.0, 0.5], dtype=torch.float16),
        "length": torch.tensor(290),
        "bias": torch.zeros(301, 301),
    }
    return program, tensors, {"B": 2, "H": 3, "Hkv": 3, "Lq": 301, "Lk": 301}


def test_one_wait_for_all_tensors_and_parameters() -> None:
    program, tensors, sizes = reading_everything()
    near = analyse(program, sizes, {"window": 100}, tensors, (32, 16))
    far = {name: Far(t) for name, t in tensors.items()}
    found = analyse(program, sizes, {"window": Far(torch.tensor(100))}, far, (32, 16))
    assert Far.waits == 1
    assert (found.dense_kinds() == near.dense_kinds()).all()


def test_what_only_the_score_reads_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    program, tensors, sizes = reading_everything()
    moved: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: moved.append(sum(p.numel() for p in parts)) or cat(parts))
    analyse(program, sizes, {"window": 100}, {name: Far(t) for name, t in tensors.items()}, (32, 16))
    assert len(moved) == 1 and moved[0] < 2 * 301 * 4 + 301 + 200  # the ids and the flags, not the bias


def test_masks_without_device_tensors_wait_for_nothing() -> None:
    program, tensors, sizes = reading_everything()
    analyse(program, sizes, {"window": 100}, {**tensors, "bias": Far(tensors["bias"])}, (32, 16))
    assert Far.waits == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 4)])
def test_every_dtype_shape_and_stride_arrives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 2, shape)).to(dtype)
    one = torch.arange(9).to(dtype)[::4][:1]  # of stride 4
    given = {"a": Far(values), "turned": Far(values.mT if values.dim() > 1 else values), "here": values, "b": Far(one)}
    out = to_host(given)
    assert Far.waits == 1 and out["here"] is values
    assert torch.equal(out["b"], one)
    assert torch.equal(out["a"], values) and out["a"].dtype is dtype
    assert torch.equal(out["turned"], values.mT if values.dim() > 1 else values)
