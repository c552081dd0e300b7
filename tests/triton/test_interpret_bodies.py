"""Score terms that are no dot product in Triton's interpreter, values and gradients, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from body_cases import CASES, leaves, program

import attnlang as al
from attnlang.ir import Program, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Tensor = torch.Tensor


def results(found: Program, given: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    operands, others = [given[n] for n in "qkv"], {t.name: given[t.name] for t in found.tensors}
    if backend is None:
        (b, h, lq, d), (_, hk, lk, dv) = given["q"].shape, given["v"].shape
        sizes = {"B": b, "H": h, "Hkv": hk, "Lq": lq, "Lk": lk, "D": d, "Dv": dv}
        return reference(found, *operands, sizes, {}, others, d**-0.5)
    made = al.compile(found, backend=backend)(*operands, **others, return_aux=True)
    return {"o": made} if isinstance(made, Tensor) else {"o": made[0], **made[1]}


def gradients(found: Program, given: dict[str, Tensor], dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
    at = {n: t.to(dtype).requires_grad_() for n, t in given.items()}
    generator = torch.Generator().manual_seed(1)
    outs = {n: t for n, t in results(found, at, backend).items() if n != "lse"}
    weights = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in sorted(outs.items())}
    loss = torch.stack([(t.double() * weights[n]).sum() for n, t in outs.items()]).sum()
    return dict(zip(at, torch.autograd.grad(loss, list(at.values()), materialize_grads=True), strict=True)) | {
        f"value of {n}": t.detach() for n, t in outs.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, made: list[bool]) -> None:
    dims = {"l1": (24, 8), "relu": (7, 16)}.get(name, (16, 16))
    given = leaves(name, (2, 1), (9, 19), dims)
    want = gradients(program(name), given, torch.float64, None)
    got = gradients(program(name), given, torch.float32, "triton")
    assert made == [True], "no kernel made the gradients"
    for n, expected in want.items():
        size = max(1e-3, float(expected.abs().max()))
        torch.testing.assert_close(
            got[n].double(), expected, atol=1e-4 * size, rtol=0, msg=lambda text, n=n: f"{name} {n}: {text}"
        )


def test_half_types() -> None:
    given = {n: t.bfloat16() if n in "qkv" else t for n, t in leaves("additive", (2, 1), (19, 35), (16, 16)).items()}
    want = results(program("additive"), {n: t.double() for n, t in given.items()}, None)["o"]
    got = results(program("additive"), given, "triton")["o"]
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=1e-2, rtol=2**-7)


def test_rows_at_addresses_of_their_own() -> None:
    text = "pattern p(page: int[Lk]):\n    term s = sum_d(abs(x - y), Q, K[b, 0, page[k]])\n"
    text += "    values = V[b, 0, page[k]]\n    score = -s\n"
    found = al.parse(text, "p")
    given = leaves("l1", (2, 1), (19, 35), (16, 16)) | {"page": torch.randperm(35)}
    want = results(found, {n: t.double() if t.is_floating_point() else t for n, t in given.items()}, None)["o"]
    got = results(found, given, "triton")["o"]
    torch.testing.assert_close(got.double(), want, atol=3e-5, rtol=5e-5)
