"""`show --html`: one file that holds every level of the run map, small at a million tokens, and that loads nothing."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attnlang as al
from attnlang import show_html
from attnlang.show_html import page_of
from attnlang.sparsity import RunMap

from .conftest import Invoke, said

MILLION = 1 << 20


def data_of(page: str) -> dict[str, Any]:
    (line,) = re.findall(r"^const DATA = (.*);$", page, re.MULTILINE)
    out: dict[str, Any] = json.loads(line)
    return out


def decoded(level: dict[str, Any], lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """Rows of (start, end, kind), by the rule in the page's script."""
    raw = zlib.decompress(base64.b64decode(level["data"]))
    rows, runs = -(-lengths[0] // level["tile"][0]), level["runs"]
    numbers = np.frombuffer(raw, "<i4", rows + 2 * runs)
    kinds = raw[4 * (rows + 2 * runs) :]
    assert len(kinds) == runs
    counts = np.cumsum(numbers[:rows])
    out: list[list[tuple[int, int, int]]] = []
    at = 0
    for count in counts:
        row = []
        for j in range(count):
            start, length = int(numbers[rows + at]), int(numbers[rows + runs + at])
            if out and j < len(out[-1]):
                start, length = start + out[-1][j][0], length + out[-1][j][1] - out[-1][j][0]
            row.append((start, start + length, kinds[at]))
            at += 1
        out.append(row)
    assert at == runs
    return out


def million(name: str) -> RunMap:
    doc = torch.arange(MILLION)[None] // 1000
    flags = torch.zeros(MILLION, dtype=torch.bool)
    flags[torch.randperm(MILLION, generator=torch.Generator().manual_seed(1))[:64]] = True
    values = {"causal_document": {"doc": doc}, "longformer": {"globals": flags}}.get(name, {})
    return al.compile(getattr(al.library, name)).run_map(1, 1, MILLION, MILLION, **values)


@pytest.mark.parametrize("name", ["causal", "causal_sliding_window", "causal_document", "longformer"])
def test_a_million_tokens_in_a_small_file(name: str) -> None:
    runs = million(name)
    page = page_of(runs, name)
    assert len(page.encode()) < 300_000
    data = data_of(page)
    assert data["lengths"] == [MILLION, MILLION] and data["note"] == ""
    assert data["levels"][0]["tile"] == [128, 128]
    assert MILLION // data["levels"][-1]["tile"][0] <= 32


def test_every_level_is_the_map_at_its_tile() -> None:
    doc = (torch.arange(900) // 70).expand(3, -1)
    runs = al.compile(al.library.causal_document).run_map(
        3, 1, 900, 900, tile=(8, 16), doc=doc + torch.eye(3, 900).long()
    )
    data = data_of(page_of(runs, "documents", batch=2))
    assert [level["tile"] for level in data["levels"]] == [[8 << i, 16 << i] for i in range(3)]
    alone = al.compile(al.library.causal_document).run_map(
        1, 1, 900, 900, tile=(8, 16), doc=doc[2:] + torch.eye(3, 900).long()[2:]
    )
    for level in data["levels"]:
        assert decoded(level, data["lengths"]) == list(alone.retile(tuple(level["tile"])))


def test_levels_that_do_not_fit_are_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = np.random.default_rng(0).integers(0, 3, (600, 600))
    runs = RunMap.from_tiles(kinds, (16, 16), (9600, 9600))
    page = page_of(runs, "noise")
    assert len(page.encode()) < 300_000
    data = data_of(page)
    assert data["levels"][0]["tile"] != [16, 16] and "16 x 16 is too large" in data["note"]
    monkeypatch.setattr(show_html, "BYTES", 0)
    assert len(data_of(page_of(runs, "noise"))["levels"]) == 1  # the coarsest stays


class _Page(HTMLParser):
    """Tags and their attributes; raises where a tag is closed that is not open."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    runs = al.compile(al.library.causal).run_map(1, 1, 512, 512)
    page = page_of(runs, '</script><img src="x"> & "quotes" @@DATA@@')
    reader = _Page()
    reader.feed(page)
    reader.close()
    assert not reader.open
    tags = [tag for tag, _ in reader.found]
    assert tags.count("script") == 1 and "img" not in tags and "link" not in tags
    assert not any("src" in attributes or "href" in attributes for _, attributes in reader.found)
    assert "://" not in page
    (policy,) = (a["content"] for _, a in reader.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert '</script><img src="x"> & "quotes" @@DATA@@' in reader.text  # the title, as text
    assert "512 queries x 512 keys in tiles of 128 x 128: 6 full, 4 partial, 6 empty" in reader.text


def test_html_from_the_command_line(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "mask.html"
    result = invoke("show", "sliding_window", "--set", "window=64", "--len", 1000, "--html", path)
    assert result.exit_code == 0, result.output
    assert "sliding_window(window=64)" in path.read_text(encoding="utf-8")
    assert re.search(r"wrote .*mask.html \(\d+ KiB\)", result.output.replace("\n", ""))
    assert [p.name for p in tmp_path.iterdir()] == ["mask.html"]
    assert data_of(path.read_text(encoding="utf-8"))["levels"][0]["tile"] == [32, 32]
    wide = invoke("show", "causal", "--len", 16384, "--tile", "64x256", "--html", path)
    assert wide.exit_code == 0, wide.output
    assert data_of(path.read_text(encoding="utf-8"))["levels"][0]["tile"] == [64, 256]


def test_html_of_one_head(invoke: Invoke, tmp_path: Path) -> None:
    pages = []
    for head in (0, 7):
        result = invoke("show", "axial", "--len", 256, "--at", f"0,{head}", "--html", tmp_path / "m.html")
        assert result.exit_code == 0, result.output
        pages.append((tmp_path / "m.html").read_text(encoding="utf-8"))
    assert "head 7" in pages[1]
    assert data_of(pages[0]) != data_of(pages[1])


@pytest.mark.parametrize("lengths", [(0, 0), (0, 8), (8, 0), (1, 1)])
def test_lengths_of_nothing(invoke: Invoke, tmp_path: Path, lengths: tuple[int, int]) -> None:
    path = tmp_path / "mask.html"
    result = invoke("show", "causal", "--q-len", lengths[0], "--kv-len", lengths[1], "--html", path)
    assert result.exit_code == 0, result.output
    assert data_of(path.read_text(encoding="utf-8"))["lengths"] == list(lengths)


def test_html_that_cannot_be_written(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("show", "causal", "--html", tmp_path / "no" / "mask.html")
    assert result.exit_code == 1
    said(result, "cannot write")
