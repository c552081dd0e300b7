"""Instruction sets as data: vector width, register blocks and compiler flags of the C++ target.

A template never asks which instruction set it is printed for; everything it needs is a number of this record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["AMX", "COMMON_FLAGS", "ISAS", "Isa", "best_isa", "few_rows", "with_key_tile"]

COMMON_FLAGS = ("-O3", "-shared", "-fPIC", "-fwrapv", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-Wno-psabi")
"""Flags of every kernel. Value-changing ones (-ffast-math) are never among them: kernels rely on NaN and infinity."""


@dataclass(frozen=True)
class Isa:
    """How a kernel uses a processor.

    Queries lie on lanes. A register block is ``vectors`` vectors of queries by ``keys`` keys (or value dimensions): its
    accumulators, one row of operands and one broadcast must fit the registers. A query block is ``blocks`` register
    blocks, and is the query tile of the run map; ``tile`` is its key tile. ``chunk`` is the number of keys between two
    updates of the running maximum. ``maximum`` is the instruction for the larger of two vectors (the second where
    either is NaN) where compilers do not find it. ``needs`` are the processor features (as Linux names them) the
    ``flags`` turn on. With ``matrix`` the products run on a matrix unit for bfloat16, in blocks of 32 by 32.
    """

    name: str
    lanes: int
    vectors: int
    blocks: int
    keys: int
    chunk: int
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    tile: int = 64
    maximum: str = ""
    matrix: bool = False

    @property
    def rows(self) -> int:
        """Queries of a query block."""
        return self.lanes * self.vectors * self.blocks

    @property
    def blocks_template(self) -> str:
        """The template of the products and of the online softmax."""
        return "cpp_tiles.j2" if self.matrix else "cpp_blocks.j2"


def _flags(*features: str) -> tuple[str, ...]:
    return tuple(f"-m{f}" for f in features)


_AVX2 = ("avx2", "fma", "f16c", "bmi", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")


def _needs(features: tuple[str, ...]) -> frozenset[str]:
    return frozenset("bmi1" if f == "bmi" else f for f in features)


ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa(
            "avx512",
            lanes=16,
            vectors=4,
            blocks=1,
            keys=6,
            chunk=96,
            flags=(*_flags(*_AVX512), "-mprefer-vector-width=512"),
            needs=_needs(_AVX512),
            maximum="vmaxps %2, %1, %0",
        ),
        Isa("avx2", lanes=8, vectors=2, blocks=4, keys=6, chunk=64, flags=_flags(*_AVX2), needs=_needs(_AVX2)),
        Isa("generic", lanes=4, vectors=2, blocks=8, keys=5, chunk=64),
    )
}
"""Known instruction sets, best first."""

AMX = replace(
    ISAS["avx512"],
    name="amx",
    chunk=128,
    flags=(*ISAS["avx512"].flags, "-mamx-tile", "-mamx-bf16"),
    needs=ISAS["avx512"].needs | {"amx_tile", "amx_bf16"},
    matrix=True,
)
"""AVX-512 with a matrix unit; for bfloat16 only, and where there are enough queries to fill it."""


def few_rows(isa: Isa, rows: int = 1) -> Isa:
    """The variant of ``isa`` for at most ``rows`` queries: fewer vectors of them, more keys in a register block.

    The number of vectors is a power of two, so that few variants are ever built.
    """
    vectors = 1 << (-(-rows // isa.lanes) - 1).bit_length()
    if vectors >= isa.vectors * isa.blocks:
        return isa
    name = f"{isa.name}-rows{isa.lanes * vectors}"
    if vectors >= isa.vectors:
        return replace(isa, name=name, blocks=vectors // isa.vectors)
    keys = min(isa.keys * isa.vectors // vectors, 2 * isa.keys)
    return replace(isa, name=name, vectors=vectors, blocks=1, keys=keys, chunk=min(isa.chunk, 48))


def with_key_tile(isa: Isa, keys: int) -> Isa:
    """The variant of ``isa`` whose key tile is ``keys``; 0, and a matrix unit, leave the usual one."""
    if keys in (0, isa.tile) or isa.matrix:
        return isa
    return replace(isa, name=f"{isa.name}-tile{keys}", tile=keys)


def best_isa(features: frozenset[str]) -> Isa:
    """Return the best instruction set whose needs are among ``features``."""
    return next(isa for isa in ISAS.values() if isa.needs <= features)
