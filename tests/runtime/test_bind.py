"""Every wrong argument of a call gets one clear error, and right ones get their sizes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import attnlang as al
from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    Const,
    Load,
    Param,
    Program,
    ScalarParam,
    Size,
    TensorParam,
    UsageError,
    build,
    simple,
)
from attnlang.runtime.bind import Binder, check_scale

B, H, HKV, LQ, LK, D, DV = 2, 4, 2, 6, 5, 8, 3


def operands(**change: Any) -> dict[str, torch.Tensor]:
    made = {"q": torch.zeros(B, H, LQ, D), "k": torch.zeros(B, HKV, LK, D), "v": torch.zeros(B, HKV, LK, DV)}
    return {**made, **change}


def everything() -> Program:
    """A program with a parameter of every kind."""
    doc = build.op("eq", Load("doc", (build.q,), INT), Load("ids", (build.b, build.k), INT))
    near = build.op("lt", build.op("sub", build.q, build.k), Param("window", INT))
    flag = build.any_of(Load("flag", (build.k,), BOOL), Param("all", BOOL))
    bias = build.op("mul", Load("slope", (build.h,), FLOAT), Param("gain", FLOAT))
    return simple(
        "everything",
        mask=build.all_of(doc, near, flag),
        score=build.op("add", build.s, bias),
        scalars=(ScalarParam("window", INT), ScalarParam("gain", FLOAT, 1.0), ScalarParam("all", BOOL, False)),
        tensors=(
            TensorParam("doc", INT, (Size("N"),)),
            TensorParam("ids", INT, (Size("B"), Size("Lk"))),
            TensorParam("flag", BOOL, (Size("Lk"),)),
            TensorParam("slope", FLOAT, (Size("H"),)),
        ),
    )


def values(**change: Any) -> dict[str, Any]:
    made = {
        "window": 3,
        "doc": torch.zeros(LQ, dtype=torch.int32),
        "ids": torch.zeros(B, LK, dtype=torch.int64),
        "flag": torch.ones(LK, dtype=torch.bool),
        "slope": torch.ones(H),
    }
    return {name: v for name, v in {**made, **change}.items() if v is not None}


def bind(program: Program | None = None, scale: Any = None, given: dict[str, Any] | None = None, **change: Any):
    program = everything() if program is None else program
    return Binder(program).bind(**operands(**change), values=values() if given is None else given, scale=scale)


def refuses(message: str, **kwargs: Any) -> None:
    with pytest.raises(UsageError, match=message) as error:
        bind(**kwargs)
    assert "\n" not in str(error.value)


def test_binds_sizes_parameters_and_tensors():
    bound = bind()
    assert bound.sizes == {"B": B, "H": H, "Hkv": HKV, "Lq": LQ, "Lk": LK, "D": D, "Dv": DV, "N": LQ}
    assert bound.params == {"window": 3, "gain": 1.0, "all": False}
    assert list(bound.tensors) == ["doc", "ids", "flag", "slope"]
    assert bound.scale == D**-0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": [1.0]}, r"q must be a torch tensor, got list"),
        ({"k": None}, r"k must be a torch tensor, got NoneType"),
        ({"q": torch.zeros(H, LQ, D)}, r"q must have 4 dimensions \[batch, heads, length, head_dim\], got \(4, 6, 8\)"),
        ({"v": torch.zeros(B, HKV, LK, DV, 1)}, r"v must have 4 dimensions"),
        ({"k": torch.zeros(B, HKV, LK, D, dtype=torch.float16)}, r"one dtype, got torch.float32, torch.float16"),
        ({"k": torch.zeros(B, HKV, LK, D, device="meta")}, r"one device, got cpu, meta and cpu"),
        ({"v": torch.zeros(B, HKV, LK + 1, DV)}, r"k and v must agree in batch, heads and length"),
        ({"v": torch.zeros(B, HKV + 1, LK, DV)}, r"k and v must agree in batch, heads and length"),
        ({"q": torch.zeros(B, 5, LQ, D)}, r"multiple of the number of key heads, got 5 and 2"),
        ({"q": torch.zeros(B, H, LQ, D + 1)}, r"one head dimension, got 9 and 8"),
        ({"q": torch.zeros(3, H, LQ, D)}, r"batch of q \(3\) or 1, got 2"),
        ({"q": torch.zeros(B, H, LQ, D).to_sparse()}, r"q must be a dense tensor"),
        ({"v": torch.zeros(B, HKV, LK, 0)}, r"head dimensions must be at least 1"),
    ],
)
def test_refuses_wrong_operands(change, message):
    refuses(message, **change)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_refuses_wrong_dtypes(dtype):
    refuses("must be float16, bfloat16, float32 or float64", **{n: t.to(dtype) for n, t in operands().items()})


def test_refuses_no_key_heads():
    empty = {"k": torch.zeros(B, 0, LK, D), "v": torch.zeros(B, 0, LK, DV)}
    refuses("multiple of the number of key heads, got 4 and 0", **empty)


def test_broadcasts_a_shared_batch_of_keys():
    k, v = torch.randn(1, HKV, LK, D), torch.randn(1, HKV, LK, DV)
    bound = bind(k=k, v=v)
    assert bound.k.shape == (B, HKV, LK, D) and bound.k.stride(0) == 0
    assert torch.equal(bound.v[1], v[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": None}, r"everything needs parameter 'window' \(int\); pass window=... to the call"),
        ({"doc": None}, r"everything needs tensor 'doc' \(int\[N\]\); pass doc=\.\.\."),
        ({"windo": 3}, r"everything has no parameter 'windo'; did you mean 'window'\?"),
        ({"xyzzy": 3}, r"has no parameter 'xyzzy' \(there is: doc, ids, flag, slope, window, gain, all\)"),
        ({"window": 2.5}, r"parameter 'window' of everything must be an int, got float 2.5"),
        ({"window": True}, r"must be a number \(int\), got True"),
        ({"window": 2**63}, r"must fit in 64 bits"),
        ({"window": "3"}, r"must be an int, got str '3'"),
        ({"window": torch.tensor(3)}, r"must be a Python int, got a int64 tensor of shape \(\); use .item\(\)"),
        ({"gain": math.nan}, r"must be finite, got nan"),
        ({"gain": -math.inf}, r"must be finite, got -inf"),
        ({"gain": 1j}, r"must be a float"),
        ({"all": 1}, r"must be a bool, got int 1"),
        ({"doc": [0] * LQ}, r"doc must be a torch tensor \(int\[N\]\), got list"),
        ({"doc": torch.zeros(LQ, 1, dtype=torch.int32)}, r"doc must have 1 dimension\(s\) \(int\[N\]\), got \(6, 1\)"),
        ({"doc": torch.zeros(LQ)}, r"doc must hold int values \(int\[N\]\), got torch.float32; convert it with .long"),
        ({"flag": torch.ones(LK, dtype=torch.uint8)}, r"flag must hold bool values .* convert it with .bool\(\)"),
        ({"slope": torch.ones(H, dtype=torch.int64)}, r"slope must hold float values .* convert it with .float\(\)"),
        ({"slope": torch.ones(H, device="meta")}, r"slope is on meta, q is on cpu; move it with .to\('cpu'\)"),
        ({"slope": torch.ones(H + 1)}, r"slope must have shape \[H\]: dimension 0 is H = 4, got 5 in \(5,\)"),
        ({"ids": torch.zeros(B, LK - 1, dtype=torch.int64)}, r"shape \[B, Lk\]: dimension 1 is Lk = 5, got 4"),
        (
            {"doc": torch.zeros(LQ - 1, dtype=torch.int64)},
            r"doc is indexed with q on dimension 0, which has 5 .* Lq = 6",
        ),
    ],
)
def test_refuses_wrong_parameters(change, message):
    refuses(message, given=values(**change))


@pytest.mark.parametrize("value", [3, torch.tensor(3).item()])
def test_accepts_integers(value):
    assert bind(given=values(window=value)).params["window"] == 3


def test_accepts_numpy_numbers():
    numpy = pytest.importorskip("numpy")
    bound = bind(given=values(window=numpy.int32(7), gain=numpy.float32(0.5)))
    assert bound.params["window"] == 7 and type(bound.params["window"]) is int
    assert bound.params["gain"] == 0.5 and type(bound.params["gain"]) is float


def test_accepts_an_int_for_a_float():
    assert bind(given=values(gain=2)).params["gain"] == 2.0


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (math.nan, "scale must be finite, got nan"),
        (math.inf, "scale must be finite, got inf"),
        ("1", "scale must be a number, got str '1'"),
        (True, "scale must be a number, got bool True"),
        (torch.tensor(1.0), "scale must be a number, got a float32 tensor"),
    ],
)
def test_refuses_wrong_scales(scale, message):
    refuses(re.escape(message), scale=scale)


def test_accepts_any_finite_scale():
    assert check_scale(None, 16) == 0.25
    assert check_scale(0, 16) == 0.0
    assert check_scale(-2.5, 16) == -2.5


def lookup(*shapes: tuple[Any, ...]) -> Program:
    """A program that reads element 0 of tensors with the given shapes."""
    tensors = tuple(TensorParam(f"t{i}", INT, shape) for i, shape in enumerate(shapes))
    zero = Const(0, INT)
    terms = [build.op("ge", Load(t.name, (zero,) * len(t.shape), INT), 0) for t in tensors]
    return simple("lookup", mask=build.all_of(*terms), tensors=tensors)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def test_one_size_has_one_value():
    program = lookup((Size("N"),), (Size("N"), Size("N")))
    assert bind(program, given={"t0": ints(7), "t1": ints(7, 7)}).sizes["N"] == 7
    refuses(
        r"size N is 7 in t0 but 8 in t1 of shape \(8, 7\)", program=program, given={"t0": ints(7), "t1": ints(8, 7)}
    )


def test_a_size_with_an_offset_is_solved():
    program = lookup((build.op("add", Size("S"), 1),), (Size("S"),))
    assert bind(program, given={"t0": ints(5), "t1": ints(4)}).sizes["S"] == 4
    refuses(r"size S is 4 in t0 but 5 in t1", program=program, given={"t0": ints(5), "t1": ints(5)})
    refuses(r"t0 needs at least 1 elements where it has 0", program=program, given={"t0": ints(0), "t1": ints(4)})


def test_computed_dimensions_are_checked():
    shape = (build.op("sub", build.op("mul", 2, Param("w", INT)), 1), build.op("mul", Size("N"), Size("H")), Size("N"))
    program = lookup(shape)
    program = Program(program.name, program.stages, (ScalarParam("w", INT),), program.tensors)
    assert bind(program, given={"w": 3, "t0": ints(5, 8, 2)}).sizes["N"] == 2
    refuses(r"dimension 0 is 2 \* w - 1 = 5, got 6", program=program, given={"w": 3, "t0": ints(6, 8, 2)})
    refuses(r"dimension 1 is N \* H = 8, got 9", program=program, given={"w": 3, "t0": ints(5, 9, 2)})


def test_a_size_no_tensor_has_is_named():
    program = lookup((build.op("mul", Size("N"), Size("N")),))
    refuses(r"size N of t0 is not known", program=program, given={"t0": ints(4)})


def test_a_number_in_a_cpu_tensor_goes_to_any_device():
    program = simple(
        "scaled", score=build.op("mul", build.s, Load("c", (), FLOAT)), tensors=(TensorParam("c", FLOAT, ()),)
    )
    on_meta = {n: t.to("meta") for n, t in operands().items()}
    bound = Binder(program).bind(**on_meta, values={"c": torch.tensor(2.0)})
    assert bound.tensors["c"].device.type == "meta"


def test_lengths_are_checked_without_operands():
    attention = al.compile(everything())
    with pytest.raises(UsageError, match="Lq must not be negative, got -1"):
        attention.run_map(1, 1, -1, 5)
    with pytest.raises(UsageError, match="Lk must be an int, got float"):
        attention.run_map(1, 1, 5, 5.0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no parameter 'windo'; did you mean 'window'"):
        attention.run_map(1, 1, 5, 5, windo=3)
