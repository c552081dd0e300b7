"""`show`: pictures of masks as text and as PNG."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import attnlang as al
from attnlang.show import TilePicture, picture_of

from .conftest import Invoke, said

CAUSAL = """\
causal
▒▒· · · · · · ·
██▒▒· · · · · ·
████▒▒· · · · ·
██████▒▒· · · ·
████████▒▒· · ·
██████████▒▒· ·
████████████▒▒·
██████████████▒▒
██ full   ▒▒ partial   ·  empty
256 queries x 256 keys in tiles of 32 x 32: 28 full, 8 partial, 28 empty; 56.2% of the tiles are computed
"""


def test_text_picture_of_causal(invoke: Invoke) -> None:
    result = invoke("show", "causal", "--len", 256, "--tile", "32x32")
    assert result.exit_code == 0, result.output
    assert result.stdout == CAUSAL


def test_settings_sizes_and_made_tensors(invoke: Invoke, good: Path) -> None:
    result = invoke("show", f"{good}:band", "--set", "width=40", "--q-len", 128, "--kv-len", 256, "--tile", 64)
    assert result.exit_code == 0, result.output
    assert "band(width=40)" in result.output
    assert "128 queries x 256 keys in tiles of 64 x 64" in result.output
    packed = invoke("show", good, "--len", 128)
    assert packed.exit_code == 0, packed.output
    assert "made up: doc: int[B, Lk] of shape [1, 128], 8 sorted segments" in packed.output


def test_sides_of_a_grid_are_made_up(invoke: Invoke) -> None:
    result = invoke("show", "neighborhood_2d", "--len", 192)
    assert result.exit_code == 0, result.output
    assert "height = 12" in result.output
    assert "width = 16" in result.output


def test_orders_of_tokens(invoke: Invoke) -> None:
    words = ("neighborhood_2d", "--set", "height=16", "--set", "width=16", "--len", 256, "--tile", 16)
    plain, patches, auto = (invoke("show", *words, *more) for more in ((), ("--layout", "4x4"), ("--layout", "auto")))
    assert "16 full, 84 partial, 156 empty" in patches.output
    assert "tokens in patches of 4 x 4" in patches.output
    assert "tokens in" in auto.output
    assert patches.output != plain.output
    explained = invoke("explain", *words[:-2], "--layout", "hilbert")
    assert "tokens in Hilbert order" in explained.output
    wrong = invoke("show", "causal", "--layout", "4x4")
    assert wrong.exit_code == 1
    assert "the grid 1024 has 1" in said(wrong)


def test_heads_that_differ(invoke: Invoke) -> None:
    first, last = (invoke("show", "axial", "--len", 256, "--at", f"0,{h}") for h in (0, 7))
    assert "head 0" in first.output
    assert "head 7" in last.output
    assert first.output.splitlines()[2:] != last.output.splitlines()[2:]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "windw=5"], ["windw", "window"]),
        (["--set", "window"], ["NAME=VALUE"]),
        (["--set", "window=many"], ["must be a number"]),
        (["--set", "window=1", "--set", "window=2"], ["twice"]),
        (["--set", "window=1.5"], ["window", "int"]),
        (["--tile", "64x"], None),
        (["--tile", "axb"], ["QUERIESxKEYS"]),
        (["--tile", "0x4"], ["at least one"]),
        (["--tensors", "nowhere.pt"], ["nowhere.pt"]),
    ],
)
def test_bad_options(invoke: Invoke, words: list[str], expected: list[str] | None) -> None:
    result = invoke("show", "sliding_window", *words)
    if expected is None:
        assert result.exit_code == 0, "64x means 64x64"
        return
    assert result.exit_code == 1, result.output
    said(result, *expected)


def test_missing_parameter_says_how_to_give_it(invoke: Invoke) -> None:
    result = invoke("show", "shared_prefix")
    assert result.exit_code == 1
    said(result, "prefix", "--set prefix=")


def test_empty_lengths_are_drawn(invoke: Invoke) -> None:
    for words in (("--len", 0), ("--q-len", 0), ("--kv-len", 0)):
        result = invoke("show", "causal", *words)
        assert result.exit_code == 0, result.output
        assert "0 full, 0 partial, 0 empty" in result.output


def test_png(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    result = invoke("show", "sliding_window", "--set", "window=64", "--png", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {path}" in result.output.replace("\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["mask.png"]


def test_png_that_cannot_be_written(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("show", "causal", "--png", tmp_path / "no" / "mask.png")
    assert result.exit_code == 1
    said(result, "cannot write")
    assert invoke("show", "causal", "--png", tmp_path).exit_code == 1


def test_picture_agrees_with_the_dense_mask() -> None:
    program = al.library.causal_document
    doc = torch.tensor([0] * 50 + [1] * 70 + [2] * 80)[None]
    runs = al.compile(program).run_map(1, 1, 200, 200, tile=(32, 48), doc=doc)
    kinds = picture_of(runs, "").kinds
    position = torch.arange(200)
    dense = (position[None] <= position[:, None]) & (doc[0][:, None] == doc[0][None])
    for i, row in enumerate(kinds):
        for j, kind in enumerate(row):
            tile = dense[i * 32 : (i + 1) * 32, j * 48 : (j + 1) * 48]
            if kind == 0:
                assert not tile.any()
            elif kind == 2:
                assert tile.all()


def test_large_pictures_are_merged_and_narrow_ones_fit() -> None:
    kinds = np.tril(np.full((300, 300), 2, np.uint8), -1) + np.eye(300, dtype=np.uint8)
    text = TilePicture("big", kinds, (16, 16), 4800, 4800).text(columns=60)
    lines = text.splitlines()[1:-2]
    assert max(map(len, lines)) <= 60
    assert "10 x 10 tiles" in text
    assert re.match(r"▒▒(· )*·$", lines[0])


def test_ascii_glyphs() -> None:
    kinds = np.array([[1, 0], [2, 1]], np.uint8)
    text = TilePicture("small", kinds, (8, 8), 16, 16).text(style="ascii")
    assert text.splitlines()[1:3] == ["++ .", "##++"]
    assert text.isascii()
