"""Score functions as people write them for FlexAttention, traced and compared point by point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid import SHAPE, check_mask, check_score

from attnlang.tracing import trace

B, H, LQ, LK = SHAPE
Score = Callable[..., Any]
INF = float("inf")
_generator = torch.Generator().manual_seed(2)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=_generator, dtype=torch.float64) + 0.1


def capture(make: Callable[..., Score], *tensors: Any) -> Score:
    return make(*tensors)


def alibi(heads: int) -> Score:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + (k - q) * torch.exp2(-((h + 1) * 8.0 / heads))

    return score


def softcap(cap: float) -> Score:
    return lambda s, b, h, q, k: cap * torch.tanh(s / cap)


def natten(width: int, radius: int) -> Score:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        qx, qy = q // width, q % width
        near = ((qx - k // width).abs() <= radius) & ((qy - k % width).abs() <= radius)
        return torch.where(near, s, -INF)

    return score


def distance(pos: torch.Tensor, length: float) -> Score:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + torch.exp(-torch.sqrt(((pos[q] - pos[k]) ** 2).sum(-1)) / length)

    return score


class ContinuousBias(torch.nn.Module):
    """A bias by a small network of the relative position (Swin Transformer V2), as a mod."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(2, 8, dtype=torch.float64)
        self.down = torch.nn.Linear(8, H, bias=False, dtype=torch.float64)
        self.scale = 0.5

    def forward(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        offset = torch.stack([q // 3 - k // 3, q % 3 - k % 3]).double()
        return s + 16 * torch.sigmoid(self.down(F.relu(self.up(offset))))[h] * self.scale


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 2


SCORES: dict[str, Score] = {
    "identity": lambda s, b, h, q, k: s,
    "times two": lambda s, b, h, q, k: s * 2,
    "squared": lambda s, b, h, q, k: s * s,
    "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -INF),
    "inverse causal": lambda s, b, h, q, k: torch.where(q <= k, s, float("-inf")),
    "relative bias": lambda s, b, h, q, k: s + (q - k),
    "relative causal": lambda s, b, h, q, k: torch.where(q <= k, s + (q - k), -INF),
    "alibi": alibi(8),
    "softcap": softcap(20.0),
    "head offset": capture(lambda o: lambda s, b, h, q, k: s * o[h], rand(H)),
    "trig": lambda s, b, h, q, k: torch.sin(torch.cos(s)) + torch.tan(b),
    "trig2": lambda s, b, h, q, k: torch.where(h % 2 == 0, torch.cos(s) * torch.sin(s) + torch.tan(b), s),
    "skip odd": lambda s, b, h, q, k: torch.where(k % 2 == 0, s, -INF),
    "composed": lambda s, b, h, q, k: softcap(5.0)(alibi(4)(s, b, h, q, k), b, h, q, k),
    "all bias": capture(lambda t, x, y: lambda s, b, h, q, k: s + t[k] + x[b] + y[h], rand(LK), rand(B), rand(H)),
    "index multiple": capture(lambda bias: lambda s, b, h, q, k: s + bias[b][q], rand(B, LQ)),
    "index weird 1": capture(lambda bias: lambda s, b, h, q, k: s + bias[0][b, h][q], rand(1, B, H, LQ)),
    "index weird 2": capture(
        lambda bias, t: lambda s, b, h, q, k: s + bias[b][h][t, q], rand(B, H, 4, LQ), torch.tensor(2)
    ),
    "bias q k": capture(lambda bias: lambda s, b, h, q, k: s + bias[q, k], rand(LQ, LK)),
    "bias b q k": capture(lambda bias: lambda s, b, h, q, k: s + bias[b, q, k], rand(B, LQ, LK)),
    "bias b h q k": capture(lambda bias: lambda s, b, h, q, k: s + bias[b, h, q, k], rand(B, H, LQ, LK)),
    "bias chain": capture(lambda bias: lambda s, b, h, q, k: s + bias[b][h][q][k], rand(B, H, LQ, LK)),
    "bias split": capture(lambda bias: lambda s, b, h, q, k: s + bias[b, h][q, k], rand(B, H, LQ, LK)),
    "bias slices": capture(lambda bias: lambda s, b, h, q, k: s + bias[b, :, q, 1:][h, k % 6], rand(B, H, LQ, LK)),
    "bias ellipsis": capture(lambda bias: lambda s, b, h, q, k: s + bias[..., q, k][b, h], rand(B, H, LQ, LK)),
    "bias last": capture(
        lambda bias: lambda s, b, h, q, k: s + bias[..., k][b, h, q] - bias[-1, -2, q, -3], rand(B, H, LQ, LK)
    ),
    "bias none": capture(lambda bias: lambda s, b, h, q, k: s + bias[None, q, None, k][0, 0], rand(LQ, LK)),
    "transposed": capture(
        lambda bias: lambda s, b, h, q, k: s + bias.T[k, q] + bias[q].unsqueeze(0).mT[k, 0], rand(LQ, LK)
    ),
    "decomposed relative": capture(
        lambda rh, rw: lambda s, b, h, q, k: s + rh[b, h, q, k // 3] + rw[b, h, q, k % 3],
        rand(B, H, LQ, 3),
        rand(B, H, LQ, 3),
    ),
    "relative table": capture(lambda bias: lambda s, b, h, q, k: s + bias[(q - k) + LK], rand(LQ + LK)),
    "wrapped index": capture(lambda bias: lambda s, b, h, q, k: s + bias[q - k], rand(LK)),
    "wrapped index 2": capture(lambda bias: lambda s, b, h, q, k: s + bias[h, -1 - k], rand(H, LK)),
    "local window": capture(lambda bias: lambda s, b, h, q, k: s + bias[torch.clamp(q - k, -2, 2) + 2], rand(5)),
    "indirect": capture(
        lambda bias, o: lambda s, b, h, q, k: s + bias[o[q]], rand(9), torch.tensor([8, 0, -1, 3, 3, 2])
    ),
    "dependent": lambda s, b, h, q, k: torch.where(torch.where(b < 1, q >= k, q <= k), s, -INF),
    "natten": natten(3, 1),
    "floor divide": lambda s, b, h, q, k: s - q // (1 + k),
    "silu": lambda s, b, h, q, k: F.silu(s),
    "scalar capture": capture(lambda c: lambda s, b, h, q, k: s + c, rand()),
    "one element": capture(lambda c: lambda s, b, h, q, k: s * c, rand(1)),
    "int capture": capture(lambda c: lambda s, b, h, q, k: s + c, torch.tensor(3)),
    "key scale": capture(lambda c: lambda s, b, h, q, k: s * c[b, h].to(torch.float64), rand(B, H).half()),
    "multiplicative": capture(lambda c: lambda s, b, h, q, k: s * c[q], rand(LQ)),
    "offsets": capture(lambda x, y: lambda s, b, h, q, k: s + x[q] + y[k], rand(LQ), rand(LK)),
    "distance": distance(rand(LK, 3), 2.0),
    "norm": capture(lambda p: lambda s, b, h, q, k: s - (p[q] - p[k]).norm(), rand(LK, 3)),
    "linalg norm": capture(
        lambda p: lambda s, b, h, q, k: s - torch.linalg.norm(p[b, q] - p[b, k], dim=-1), rand(B, LK, 3)
    ),
    "norm p": capture(
        lambda p: lambda s, b, h, q, k: s - (p[q] - p[k]).norm(p=1) - torch.norm(p[q] - p[k], p=3), rand(LK, 3)
    ),
    "cdist l_inf": capture(lambda p: lambda s, b, h, q, k: s - (p[q] - p[k]).abs().max(), rand(LK, 3)),
    "dot": capture(lambda x, y: lambda s, b, h, q, k: s + (x[b, q] * y[b, k]).sum(), rand(B, LQ, 4), rand(B, LK, 4)),
    "torch dot": capture(
        lambda x, y: lambda s, b, h, q, k: s + torch.dot(x[q], y[k]) + x[q] @ y[k], rand(LQ, 4), rand(LK, 4)
    ),
    "matrix": capture(
        lambda x, m: lambda s, b, h, q, k: s + (x[q] @ m)[h] + torch.mv(m.T, x[k])[h], rand(LK, 3), rand(3, H)
    ),
    "einsum": capture(lambda x: lambda s, b, h, q, k: s + torch.einsum("i,i->", x[q], x[k]), rand(LK, 3)),
    "components": capture(lambda p: lambda s, b, h, q, k: s + p[q][0] * p[k][1] - p[q, -1], rand(LK, 3)),
    "unpack": capture(
        lambda p: lambda s, b, h, q, k: s + sum(x * y for x, y in zip(p[q], p[k], strict=True)), rand(LK, 3)
    ),
    "statistics": capture(
        lambda p: lambda s, b, h, q, k: s + p[q].mean() * p[k].prod() - p[q].var() + p[k].std(), rand(LK, 3)
    ),
    "arg": capture(
        lambda p: lambda s, b, h, q, k: s + p[q].argmax() - p[k].min(dim=0).indices + p[q].max(0).values, rand(LK, 5)
    ),
    "softmax": capture(
        lambda p: lambda s, b, h, q, k: s * torch.softmax(p[q], -1)[h] + torch.logsumexp(p[k], 0), rand(LK, H)
    ),
    "whole sum": capture(lambda m: lambda s, b, h, q, k: s + (m * (q - k)).sum(), rand(3, 4)),
    "derived": capture(lambda t: lambda s, b, h, q, k: s + t.exp().sum(0)[h], rand(3, H)),
    "mass": capture(lambda m: lambda s, b, h, q, k: s + torch.log(m[0]), rand(2)),
    "inverse": lambda s, b, h, q, k: 1 / s,
    "guarded log": lambda s, b, h, q, k: torch.where(s > 0, torch.log(s), s),
    "gated": capture(lambda g, t: lambda s, b, h, q, k: s + torch.sigmoid(g[h]) * t[q + k], rand(H), rand(LQ + LK)),
    "2d table": capture(lambda t: lambda s, b, h, q, k: s + t[q // 3 - k // 3 + 2, q % 3 - k % 3 + 2], rand(5, 5)),
    "3d transposed": capture(lambda t: lambda s, b, h, q, k: s + t.permute(2, 0, 1)[h, q, k], rand(LQ, LK, H)),
    "from mask": capture(
        lambda m: lambda s, b, h, q, k: torch.where(m[b, 0, q, k], s, s.new_full((), -INF)), rand(B, 1, LQ, LK) > 0.5
    ),
    "additive mask": lambda s, b, h, q, k: s + torch.where(q >= k, 0.0, -INF),
    "finfo": lambda s, b, h, q, k: torch.where(q >= k, s, torch.finfo(torch.float32).min),
    "masked fill": lambda s, b, h, q, k: s.masked_fill(q < k, -INF),
    "in place": lambda s, b, h, q, k: (s * 1).add_(q).mul_(2),
    "dropout-like": lambda s, b, h, q, k: s * (((q * 7919 + k * 104729) % 17) > 3) / 0.8,
    "autograd function": lambda s, b, h, q, k: Double.apply(s) + q,
    "network": ContinuousBias(),
    "bucket": lambda s, b, h, q, k: s + torch.floor(torch.log2((q - k).abs() + 1.0)),
    "t5": capture(
        lambda t: (
            lambda s, b, h, q, k: (
                s
                + t[
                    torch.where(
                        (q - k).abs() < 4,
                        (q - k).abs(),
                        torch.minimum(4 + torch.log((q - k).abs().float() / 4 + 1e-6).to(torch.int64), torch.tensor(7)),
                    ),
                    h,
                ]
            )
        ),
        rand(8, H),
    ),
    "reshape": capture(
        lambda t: lambda s, b, h, q, k: s + t.view(-1)[q * LK + k] + t[q].view(1, -1)[0, k], rand(LQ, LK)
    ),
    "reshape traced": capture(lambda t: lambda s, b, h, q, k: s + t[b].reshape(-1)[q * LK + k], rand(B, LQ, LK)),
    "gather": capture(lambda t: lambda s, b, h, q, k: s + torch.gather(t[q], 0, k.unsqueeze(0))[0], rand(LQ, LK)),
    "index select": capture(
        lambda t: lambda s, b, h, q, k: s + t.index_select(0, q)[0, k] + torch.take(t, k), rand(LQ, LK)
    ),
    "embedding": capture(lambda t: lambda s, b, h, q, k: s + F.embedding(q, t)[h], rand(LQ, H)),
    "flip roll": capture(lambda t: lambda s, b, h, q, k: s + t[q].flip(0)[k] + torch.roll(t[q], 2)[k], rand(LQ, LK)),
    "cat": capture(lambda t: lambda s, b, h, q, k: s + torch.cat([t[q], t[0] * 2])[k + 3], rand(LQ, LK)),
    "literal table": lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)[h],
    "literal arange": lambda s, b, h, q, k: s + (torch.arange(3) * q).sum(),
    "diagonal": capture(lambda t: lambda s, b, h, q, k: s + (t * q).diagonal(1)[h] + torch.trace(t * k), rand(5, 5)),
    "two norm squared": capture(lambda p: lambda s, b, h, q, k: s - (p[q] - p[k]).pow(2).sum(-1), rand(LK, 3)),
    "chunks": capture(lambda p: lambda s, b, h, q, k: s + p[q].chunk(2)[1][0] + p[k].split(3)[0].sum(), rand(LK, 4)),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_equals_its_function_everywhere(name: str) -> None:
    check_score(SCORES[name])


UNARY: dict[str, Callable[[Any], Any]] = {
    **{
        n: getattr(torch, n)
        for n in [
            "abs",
            "neg",
            "sign",
            "sgn",
            "square",
            "exp",
            "exp2",
            "expm1",
            "sin",
            "cos",
            "tan",
            "tanh",
            "sinh",
            "cosh",
            "atan",
            "sigmoid",
            "erf",
            "erfc",
            "floor",
            "ceil",
            "round",
            "trunc",
            "frac",
            "relu",
            "isnan",
            "isinf",
            "isfinite",
            "isposinf",
            "isneginf",
            "positive",
            "nan_to_num",
            "deg2rad",
            "logical_not",
            "signbit",
        ]
    },
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs()),
    "log": lambda x: torch.log(x.abs()) + torch.log2(x * x) + torch.log10(x.abs()) + torch.log1p(x.abs()),
    "asin": lambda x: torch.asin(torch.tanh(x)) + torch.acos(torch.tanh(x)) + torch.arctan(x),
    "reciprocal": torch.reciprocal,
    "logit": lambda x: torch.logit(torch.sigmoid(x)),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": lambda x: F.softplus(x, 2.0, 1.5),
    "softplus default": F.softplus,
    "logsigmoid": F.logsigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "leaky": F.leaky_relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.1, -3.0),
    "round 1": lambda x: torch.round(x, decimals=1),
    "pow": lambda x: x**2 + x**3 + x**-1 + x.abs() ** 0.5 + x.abs() ** -0.5 + x**0 + x**1 + x.abs() ** 1.7,
    "rpow": lambda x: 2**x + 2.5**x,
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0) + torch.clip(x, max=0.2) + x.clamp_min(0.3) + x.clamp_max(1),
    "casts": lambda x: x.int() + x.long() + x.bool().float() + x.to(torch.int32).double() + x.type(torch.float64),
    "minmax": lambda x: torch.max(x, -x) + torch.min(x, x * x) + torch.maximum(x, x * 2) + torch.fmin(x, x * 3),
    "div": lambda x: torch.div(x, 0.3, rounding_mode="floor") + torch.div(x, 0.3, rounding_mode="trunc") + x / 3,
    "mod": lambda x: x % 0.7 + torch.remainder(x, -0.7) + torch.fmod(x, 0.7) + x // 0.3,
    "lerp": lambda x: torch.lerp(x, x * x, 0.3) + torch.addcmul(x, x, x, value=2) + torch.addcdiv(x, x, x * x + 1),
    "alpha": lambda x: torch.add(x, x, alpha=3) - torch.sub(x, 1, alpha=2) + torch.rsub(x, 1),
    "atan2": lambda x: torch.atan2(x, x * x - 0.5) + torch.atan2(x, torch.zeros_like(x)) + torch.hypot(x, x + 1),
    "logaddexp": lambda x: torch.logaddexp(x, x * 2) + torch.xlogy(x, x.abs() + 1),
    "where": lambda x: torch.where(x > 0, 1, 0) + torch.where(x > 0, 1.5, x) + torch.where(x > 0, x, 2),
    "likes": lambda x: (
        torch.ones_like(x) + torch.zeros_like(x) + torch.full_like(x, 3) + x.new_zeros(()) + x.new_ones(())
    ),
    "heaviside": lambda x: torch.heaviside(x, x * 0 + 0.5),
}


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_the_score(name: str) -> None:
    check_score(lambda s, b, h, q, k: UNARY[name](s) * 1.0)


INTS: dict[str, Callable[[Any, Any], Any]] = {
    "floor": lambda x, y: x // y + torch.floor_divide(x, y) + torch.div(x, y, rounding_mode="floor"),
    "trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "true": lambda x, y: x / y,
    "mod": lambda x, y: x % y + torch.remainder(x, y) + 17 % y,
    "fmod": lambda x, y: torch.fmod(x, y),
    "left": lambda x, y: 7 // y + 7 / y + 7 - y,
    "bits": lambda x, y: (x & y) + (x | y) + (x ^ y) + ~x + (x & 3) + (1 | y),
    "pow": lambda x, y: x**2 + x**3 + 2 ** y.abs() + x ** y.abs(),
    "shift": lambda x, y: (x << y.abs()) + (x >> y.abs()) + (x << 2),
    "minmax": lambda x, y: torch.minimum(x, y) + torch.maximum(x, y) + x.clamp(-1, 2) + x.abs() + x.sign(),
    "mixed": lambda x, y: x * 0.5 + y * 2.0 + (x > y) * 3 + (x > y).int() + (x == 1).float(),
    "square": lambda x, y: x.square() + (-y) + x.float().floor() + torch.ceil(x / y),
    "bools": lambda x, y: ((x > y) | (x == 1)).long() + ((x > 0) & (y > 0)) * 1 + ((x > 0) ^ (y > 0)) * 1,
    "bool arithmetic": lambda x, y: (
        ((x > 0) + (y > 0)).long() + ((x > 0) * (y > 0)).long() + torch.maximum(x > 0, y > 0)
    ),
    "exponent": lambda x, y: torch.exp(x * 0.1) + torch.sqrt(x.abs()) + torch.sigmoid(y),
}


@pytest.mark.parametrize("name", INTS)
def test_integer_arithmetic(name: str) -> None:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        x, y = q - 3, k - 3
        return s + INTS[name](x, torch.where(y == 0, 5, y))

    check_score(score)


def test_mask_and_score_share_one_program() -> None:
    bias = rand(H)
    traced = trace(lambda b, h, q, k: bias[h] > q, lambda s, b, h, q, k: s + bias[h], name="both")
    assert traced.program.name == "both"
    assert list(traced.tensors) == ["bias"]
    assert traced.tensors["bias"] is bias


def test_captured_tensors_keep_requiring_gradients_also_when_derived() -> None:
    table = rand(3, H).requires_grad_()
    traced = trace(score_mod=lambda s, b, h, q, k: s + table.exp()[0][h] * table[1, h])
    assert traced.tensors["table"] is table
    (derived,) = traced.derived
    traced.tensors[derived].sum().backward()
    assert table.grad is not None


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(grad: Any) -> None:
    with grad():
        check_score(SCORES["network"])
        check_score(SCORES["distance"])
        check_score(lambda s, b, h, q, k: F.softplus(F.gelu(s)) + (q - k).abs())


def test_default_dtype_and_device() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        check_score(SCORES["additive mask"])
        with torch.device("cpu"):
            check_score(SCORES["literal table"])
    finally:
        torch.set_default_dtype(before)


def test_score_in_the_mask_position_of_a_literal_condition() -> None:
    check_mask(lambda b, h, q, k: torch.where(q >= k, True, False))
