"""FlexAttention's BlockMask on top of run maps.

A mask made by ``create_block_mask`` is its mask function: tiles are classified by proof when a kernel needs them, and
the block lists of FlexAttention (``kv_indices`` and its relatives) are computed only when someone reads them. A mask
made from block lists, by ``from_kv_blocks`` or by slicing, restricts its mask function: a pair is visible where its
block is full, or where its block is partial and the function says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from attnlang.ir import UsageError
from attnlang.sparsity import EMPTY, RunMap

from .block_lists import Blocks, RunBlocks, kinds_from_lists

__all__ = ["BlockMask", "noop_mask", "sliced_mask_error"]

Tensor = torch.Tensor
MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

DEFAULT_BLOCK = 128


class BlockMaskError(UsageError, RuntimeError):
    """A block mask is used in a way that cannot work; also a RuntimeError, as in PyTorch."""


def noop_mask(batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor) -> Tensor:
    """The mask function that lets every query see every key."""
    return batch.new_ones((), dtype=torch.bool)


def sliced_mask_error(batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor) -> Tensor:
    """Stand-in for the mask function of a sliced BlockMask, whose indices it no longer knows."""
    raise BlockMaskError(
        "Cannot use mask_mod from a sliced BlockMask: slicing forgets which rows were kept. Assign the sliced mask a "
        "mask_mod made from the original one, for example sliced.mask_mod = shifted(original.mask_mod)."
    )


class BlockMask:
    """A block-sparse attention mask with the interface of ``torch.nn.attention.flex_attention.BlockMask``.

    ``structured`` says that the block lists restrict ``mask_mod``; otherwise they merely follow from it.
    """

    def __init__(
        self,
        seq_lengths: tuple[int, int],
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        q_num_blocks: Tensor | None = None,
        q_indices: Tensor | None = None,
        full_q_num_blocks: Tensor | None = None,
        full_q_indices: Tensor | None = None,
        BLOCK_SIZE: tuple[int, int] = (DEFAULT_BLOCK, DEFAULT_BLOCK),
        mask_mod: MaskMod = noop_mask,
        *,
        dq_write_order: Tensor | None = None,
        dq_write_order_full: Tensor | None = None,
        dq_kv_order: Tensor | None = None,
        dq_kv_order_spt: bool | None = None,
    ) -> None:
        _check_rank(kv_indices)
        for kind, num, idx in (
            ("kv", full_kv_num_blocks, full_kv_indices),
            ("q", full_q_num_blocks, full_q_indices),
        ):
            if (num is None) != (idx is None):
                raise BlockMaskError(f"full_{kind}_num_blocks and full_{kind}_indices must be both given or omitted")
        self.seq_lengths = seq_lengths
        self.BLOCK_SIZE = BLOCK_SIZE
        self.structured = True
        self._batch_shape = tuple(kv_indices.shape[:-2])
        self._device: torch.device | None = kv_indices.device
        self._mask_mod = mask_mod
        self._make: Callable[[], Blocks | RunBlocks] | None = None
        self._prove: Callable[[], RunMap] | None = None
        self._blocks: Blocks | RunBlocks | None = Blocks(
            kv_num_blocks,
            kv_indices,
            full_kv_num_blocks,
            full_kv_indices,
            q_num_blocks,
            q_indices,
            full_q_num_blocks,
            full_q_indices,
        )
        self._kinds: Tensor | None = None
        # schedules of another library's backward kernel: kept for those who read them, not used here
        self.dq_write_order, self.dq_write_order_full = dq_write_order, dq_write_order_full
        self.dq_kv_order, self.dq_kv_order_spt = dq_kv_order, dq_kv_order_spt

    @classmethod
    def lazy(
        cls,
        mask_mod: MaskMod,
        batch_shape: tuple[int, ...],
        seq_lengths: tuple[int, int],
        block_size: tuple[int, int],
        device: torch.device | None,
        make: Callable[[], Blocks | RunBlocks],
        prove: Callable[[], RunMap] | None = None,
    ) -> BlockMask:
        """Return a mask that is ``mask_mod``; ``make`` computes the block lists when they are read.

        ``prove`` gives the run map of the function, with no more looked at than a kernel needs.
        """
        self = cls.__new__(cls)
        self.seq_lengths, self.BLOCK_SIZE = seq_lengths, block_size
        self.structured = False
        self._batch_shape, self._device = batch_shape, device
        self._mask_mod, self._make, self._prove, self._blocks, self._kinds = mask_mod, make, prove, None, None
        self.dq_write_order = self.dq_write_order_full = self.dq_kv_order = None
        self.dq_kv_order_spt = None
        return self

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        BLOCK_SIZE: int | tuple[int, int] = DEFAULT_BLOCK,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
        *,
        dq_write_order: Tensor | None = None,
        dq_write_order_full: Tensor | None = None,
        dq_kv_order: Tensor | bool | None = None,
    ) -> BlockMask:
        """Return the mask whose visible blocks are listed; ``mask_mod`` applies inside partial blocks only.

        Raises:
            UsageError: indices of fewer than 2 dimensions, or only one of the ``full_kv_*`` pair.
        """
        _check_rank(kv_indices)
        size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else BLOCK_SIZE
        lengths = seq_lengths or (kv_indices.shape[-2] * size[0], kv_indices.shape[-1] * size[1])
        out = cls(
            lengths,
            kv_num_blocks,
            kv_indices,
            full_kv_num_blocks,
            full_kv_indices,
            BLOCK_SIZE=size,
            mask_mod=noop_mask if mask_mod is None else mask_mod,
            dq_write_order=dq_write_order,
            dq_write_order_full=dq_write_order_full,
            dq_kv_order=dq_kv_order if isinstance(dq_kv_order, Tensor) else None,
            dq_kv_order_spt=dq_kv_order if isinstance(dq_kv_order, bool) else None,
        )
        if compute_q_blocks and isinstance(out._blocks, Blocks):
            out._blocks = out._blocks.with_queries()
        return out

    # --- the block lists

    @property
    def blocks(self) -> Blocks | RunBlocks:
        """All block lists; those of a mask function are made one by one as they are read."""
        if self._blocks is None:
            assert self._make is not None
            made = self._make()
            self._blocks = made if self._device is None else made.to(self._device)
        return self._blocks

    def kinds(self) -> Tensor:
        """Kinds of blocks (EMPTY, PARTIAL, FULL), int8 [B, H, rows, cols]."""
        if self._kinds is None:
            blocks = self.blocks
            self._kinds = blocks.kinds() if isinstance(blocks, RunBlocks) else kinds_from_lists(blocks)
        return self._kinds

    def run_map(self) -> RunMap:
        """The tiles of the mask as runs, of the batch and the heads it depends on; no block list is made.

        What is proved about a mask function, as kernels use it: a tile may count as partial that is not.
        """
        if self._prove is not None and not self.structured:
            return self._prove()
        kinds = self.kinds()
        return RunMap.from_tiles(kinds.numpy(force=True), self.BLOCK_SIZE, self.seq_lengths)

    kv_num_blocks = property(lambda self: self.blocks.kv_num_blocks)
    kv_indices = property(lambda self: self.blocks.kv_indices)
    full_kv_num_blocks = property(lambda self: self.blocks.full_kv_num_blocks)
    full_kv_indices = property(lambda self: self.blocks.full_kv_indices)
    q_num_blocks = property(lambda self: self.blocks.q_num_blocks)
    q_indices = property(lambda self: self.blocks.q_indices)
    full_q_num_blocks = property(lambda self: self.blocks.full_q_num_blocks)
    full_q_indices = property(lambda self: self.blocks.full_q_indices)

    @property
    def mask_mod(self) -> MaskMod:
        return self._mask_mod

    @mask_mod.setter
    def mask_mod(self, value: MaskMod) -> None:
        if value is not self._mask_mod and not self.structured:
            _ = self.blocks  # the blocks stay those of the function the mask was created with
            self.structured = True
        self._mask_mod = value

    # --- what it looks like

    @property
    def device(self) -> torch.device | None:
        """Device of the block lists; None where nobody has asked for one."""
        return self._device

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, query length, key length)."""
        return (*self._batch_shape, *self.seq_lengths)

    def numel(self) -> int:
        """Number of pairs, visible or not."""
        return math.prod(self.shape)

    def sparsity(self) -> float:
        """Percentage of pairs in blocks that are skipped."""
        total = self.numel()
        if not total:
            return 0.0
        blocks = self.blocks.computed()
        return 100 * (1 - blocks * self.BLOCK_SIZE[0] * self.BLOCK_SIZE[1] / total)

    def to_dense(self) -> Tensor:
        """int32 [B, H, rows, cols]: 1 for every block that is not skipped."""
        return (self.kinds() != EMPTY).to(torch.int32)

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """Draw the blocks of up to ``limit`` (batch, head) pairs; ``grid_size`` -1 draws every block."""
        rows, cols = (-(-n // size) for n, size in zip(self.seq_lengths, self.BLOCK_SIZE, strict=True))
        if isinstance(grid_size, int):
            high, wide = (rows, cols) if grid_size == -1 else (grid_size, grid_size)
        else:
            high, wide = grid_size
        step_q, step_k = max(1, -(-rows // max(1, high))), max(1, -(-cols // max(1, wide)))
        pictures = []
        for n, index in enumerate(itertools.product(*map(range, self._batch_shape))):
            if n == limit:
                more = "To print out more, set BlockMask.to_string(limit=N)"
                which = "You can also index (BlockMask[batch, head]) to choose a specific batch or head"
                pictures += ["...", more, which]
                break
            pictures.append(f"{index}\n" + _draw(self._coverage(index, step_q, step_k)))
        return "\n".join(pictures)

    def _coverage(self, index: tuple[int, ...], step_q: int, step_k: int) -> np.ndarray:
        """Share of blocks that are not skipped in each cell of ``step_q`` x ``step_k`` blocks, float64."""
        blocks = self.blocks
        if isinstance(blocks, RunBlocks):
            return blocks.coverage(index, step_q, step_k)
        dense = self.to_dense()[index].numpy(force=True).astype(np.float64)
        rows, cols = (np.arange(0, n, step) for n, step in zip(dense.shape, (step_q, step_k), strict=True))
        if not dense.size:
            return np.zeros((len(rows), len(cols)))
        total = np.add.reduceat(np.add.reduceat(dense, rows, axis=0), cols, axis=1)
        area = np.diff(rows, append=dense.shape[0])[:, None] * np.diff(cols, append=dense.shape[1])
        return np.asarray(total / area)

    def __str__(self) -> str:
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%, \n{self.to_string().strip()}\n)"

    def __repr__(self) -> str:
        name = getattr(self.mask_mod, "__name__", repr(self.mask_mod))
        kind = "block lists and mask_mod" if self.structured else "mask_mod"
        return f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, {kind}={name})"

    # --- other masks from this one

    def __getitem__(self, index: Any) -> BlockMask:
        """Slice batch, head and rows of blocks; an int keeps its dimension. The result needs a new ``mask_mod``."""
        index = index if isinstance(index, tuple) else (index,)
        padded = (*index, slice(None), slice(None), slice(None))[:3]
        where = tuple(
            (slice(i + n, i + n + 1) if -n <= i < 0 else slice(i, i + 1)) if isinstance(i, int) else i
            for i, n in zip(padded, self.kv_num_blocks.shape[:3], strict=True)
        )
        blocks = self.blocks
        lists = blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices
        kv_num, kv_idx, full_num, full_idx = (None if t is None else t[where] for t in lists)
        assert kv_num is not None and kv_idx is not None
        return BlockMask.from_kv_blocks(
            kv_num,
            kv_idx,
            full_num,
            full_idx,
            BLOCK_SIZE=self.BLOCK_SIZE,
            mask_mod=sliced_mask_error,
            seq_lengths=self.seq_lengths,
            compute_q_blocks=isinstance(blocks, RunBlocks) or blocks.q_indices is not None,
        )

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """Crop the mask to its upper left corner."""
        rows, cols = -(-new_q_len // self.BLOCK_SIZE[0]), -(-new_kv_len // self.BLOCK_SIZE[1])

        def crop() -> Blocks:
            return Blocks.from_kinds(self.kinds()[..., :rows, :cols], self.full_kv_indices is not None)

        return self._like((new_q_len, new_kv_len), self._device, crop)

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the mask with its block lists on ``device``; tensors ``mask_mod`` closes over stay where they are."""
        return self._like(self.seq_lengths, torch.device(device), lambda: self.blocks, self._prove)

    def _like(
        self,
        lengths: tuple[int, int],
        device: torch.device | None,
        make: Callable[[], Blocks | RunBlocks],
        prove: Callable[[], RunMap] | None = None,
    ) -> BlockMask:
        out = BlockMask.lazy(self.mask_mod, self._batch_shape, lengths, self.BLOCK_SIZE, device, make, prove)
        out.structured = self.structured
        return out

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """The attributes in the order PyTorch's ``as_tuple`` has them."""
        lengths, size = (self.seq_lengths, self.BLOCK_SIZE) if flatten else ((self.seq_lengths,), (self.BLOCK_SIZE,))
        schedule = (self.dq_write_order, self.dq_write_order_full, self.dq_kv_order, self.dq_kv_order_spt)
        return (*lengths, *self.blocks.tensors(), *schedule, *size, self.mask_mod)


def _check_rank(kv_indices: Tensor) -> None:
    if kv_indices.dim() < 2:
        raise BlockMaskError("BlockMask must have at least 2 dimensions")


def _draw(coverage: np.ndarray) -> str:
    lines = ["".join(("█" if m == 1 else " " if m == 0 else "░") * 2 for m in row) for row in coverage.tolist()]
    return "".join(line + "\n" for line in lines)
