"""Hostile texts: each gives a clean answer quickly, whatever it repeats, nests or multiplies."""

import sys
import time

import pytest

from attnlang.grammar import AttnError, parse

P = "pattern p:\n    mask = "


def doubling(n, left, right):
    text = "def f0(x: int) = x + 1\n"
    return text + "".join(f"def f{i}(x: int) = f{i - 1}({left}) * f{i - 1}({right})\n" for i in range(1, n + 1))


REFUSED = {
    "parentheses": (P + "(" * 10_000 + "q" + ")" * 10_000 + " < k", "ATL106"),
    "open parentheses": (P + "(" * 10_000, "ATL106"),
    "indices": ("pattern p(t: int[Lk]):\n    mask = " + "t[" * 10_000 + "q" + "]" * 10_000 + " < 3", "ATL106"),
    "not": (P + "not " * 60_000 + "true", "ATL106"),
    "minus": (P + "-" * 60_000 + "q < k", "ATL106"),
    "not of a pattern": ("pattern a: mask = q < k\npattern b = " + "~" * 60_000 + "a", "ATL106"),
    "sum": (P + " + ".join(["q"] * 40_000) + " < k", "ATL106"),
    "power": (P + " ** ".join(["s"] * 40_000), "ATL213"),
    "choice": (P + "1 if q < k else " * 10_000 + "1", "ATL203"),
    "comparison": (P + " < ".join(["q"] * 40_000), "ATL106"),
    "calls": (P + "abs" + "()" * 40_000, "ATL203"),
    "words": (P + "q+" * 400_000, "ATL106"),
    "size": ("#" * 1_000_001, "ATL100"),
    "digits": (P + "9" * 900_000, "ATL107"),
    "name": (P + "a" * 900_000, "ATL200"),
    "string": (P + '"' + "a" * 900_000, "ATL102"),
    "quotes": ('"' * 900_001, "ATL104"),
    "helpers that double": (doubling(60, "x + 1", "x * 2"), "ATL106"),
    "parameters": (f"pattern p({', '.join(f'w{i}: int' for i in range(5000))}): mask = q < w3", "ATL106"),
    "composed parameters": (
        "".join(f"pattern p{i}(w{i}: int): mask = q < w{i}\n" for i in range(400))
        + "pattern z = "
        + " & ".join(f"p{i}" for i in range(400)),
        "ATL106",
    ),
    "long cycle": (
        "".join(f"def f{i}(x: int) = f{i + 1}(x)\n" for i in range(3000)) + "def f3000(x: int) = f0(x)\n",
        "ATL207",
    ),
}

ACCEPTED = {
    "nested within reason": P + "(" * 150 + "q" + ")" * 150 + " < k",
    "a long sum": P + " + ".join(["q"] * 5000) + " < k",
    "blank lines": "\n" * 900_000 + "pattern p: mask = q < k",
    "spaces": " " * 900_000,
    "comments": "#\n" * 400_000,
    "helpers that share": doubling(60, "x", "x") + "pattern p: mask = f60(q) < 3",
    "a chain of helpers": "".join(f"def f{i}(x: int) = f{i + 1}(x)\n" for i in range(3000)) + "def f3000(x: int) = x\n",
    "an unused overflow": P + "9999999999999 * " * 500 + "q < 3",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    text, code = REFUSED[name]
    start = time.perf_counter()
    with pytest.raises(AttnError) as caught:
        parse(text)
    assert caught.value.code == code, str(caught.value)
    assert len(str(caught.value)) < 10_000
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    start = time.perf_counter()
    parse(ACCEPTED[name])
    assert time.perf_counter() - start < 20


def test_deep_callers_do_not_matter():
    """The compiler needs a bounded number of Python frames, so it works near the recursion limit too."""

    def down(n):
        return down(n - 1) if n else parse(P + "(" * 190 + "q" + ")" * 190 + " < (" + "1 if q < k else " * 90 + "2)")

    depth, frame = 0, sys._getframe()
    while frame:
        depth, frame = depth + 1, frame.f_back
    assert down(sys.getrecursionlimit() - depth - 150).default.name == "p"


def test_many_files_do_not_share_state():
    good, bad = "pattern p: mask = q < k", "pattern p: mask = (q < k"
    for _ in range(3):
        assert parse(good).default.name == "p"
        with pytest.raises(AttnError, match="never closed"):
            parse(bad)
