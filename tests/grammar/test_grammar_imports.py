"""Imports: what they reach, and what they must never reach."""

import os

import pytest

from attnlang import ir
from attnlang.grammar import AttnError, load, parse

BASE = "pattern causal: mask = k <= q\npattern sliding_window(window: int = 4): mask = q - k < window\n"
BASE += "def f(x: int) = x + 1\n"


def write(folder, **files):
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".attn")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def error_of(call, *args, **kwargs):
    with pytest.raises(AttnError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_names_and_whole_files(tmp_path):
    write(
        tmp_path,
        base=BASE,
        main='from "base.attn" import causal, sliding_window as window, f\nimport "base.attn" as base\n'
        "pattern a = causal & window(3) & base.sliding_window(9)\n"
        "pattern b: mask = base.f(q) < f(k) and base.causal()\n",
    )
    module = load(tmp_path / "main.attn")
    assert list(module.patterns) == ["a", "b"]
    assert set(module.imported) == {"causal", "window", "base.causal", "base.sliding_window"}
    assert ir.format_expr(module.patterns["a"].mask) == "k <= q and q - k < 3 and q - k < 9"


def test_search_paths_serve_texts_and_nested_folders(tmp_path):
    write(tmp_path, lib__base=BASE, lib__deep__more='from "base.attn" import causal\npattern m = causal\n')
    write(tmp_path, lib__deep__base="pattern causal: mask = k < q\n")
    text = 'from "deep/more.attn" import m\npattern p = m\n'
    module = parse(text, search_paths=[tmp_path / "lib"])
    assert ir.format_expr(module.default.mask) == "k < q"  # the folder of the importing file comes first
    error = error_of(parse, text)
    assert error.code == "ATL301" and "search_paths" in error.hint


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd.attn", "../secret.attn", "a/../../secret.attn", "..\\secret.attn", "C:/x.attn", "x\x07.attn",
     "~/x.txt", "/etc/passwd", "base", "base.py", ".attn/", "https://x.y/z.attn", "a" * 2000 + ".attn"],
)  # fmt: skip
def test_paths_that_are_refused(tmp_path, path):
    write(tmp_path, secret=BASE)
    inner = write(tmp_path / "inner", main=f'import "{path}" as x\n')
    error = error_of(load, inner / "main.attn", search_paths=[inner])
    assert error.code in ("ATL300", "ATL301")
    assert (error.line, error.column) == (1, 8)


def test_links_do_not_lead_out(tmp_path):
    write(tmp_path, secret=BASE)
    inner = write(tmp_path / "inner", main='import "link.attn" as x\n')
    os.symlink(tmp_path / "secret.attn", inner / "link.attn")
    assert error_of(load, inner / "main.attn").code == "ATL301"


def test_missing_file_and_missing_name(tmp_path):
    write(
        tmp_path, base=BASE, main='from "nope.attn" import a\nfrom "base.attn" import cuasal\npattern p = a & cuasal\n'
    )
    error = error_of(load, tmp_path / "main.attn")
    assert [d.code for d in error.diagnostics] == ["ATL301", "ATL303"]
    assert error.diagnostics[1].hint == "did you mean `causal`?"
    missing = error_of(load, tmp_path / "absent.attn")
    assert missing.code == "ATL100" and "absent.attn" in str(missing)


def test_errors_inside_an_imported_file_quote_that_file(tmp_path):
    write(tmp_path, bad="pattern p: mask = windw < 3\n", main='import "bad.attn" as bad\npattern p = bad.p\n')
    error = error_of(load, tmp_path / "main.attn")
    assert error.filename.endswith("bad.attn") and error.line == 1 and len(error.diagnostics) == 1


def test_cycles(tmp_path):
    write(tmp_path, a='import "b.attn" as b\n', b='import "c.attn" as c\n', c='import "a.attn" as a\n')
    error = error_of(load, tmp_path / "a.attn")
    assert error.code == "ATL302" and "a.attn ->" in error.message
    write(tmp_path, me='import "me.attn" as me\n')
    assert error_of(load, tmp_path / "me.attn").code == "ATL302"


def test_long_chains_and_diamonds(tmp_path):
    write(tmp_path, f0=BASE)
    for i in range(1, 40):
        twice = f'import "f{i - 1}.attn" as a\nimport "f{i - 1}.attn" as b\n'
        write(
            tmp_path,
            **{f"f{i}": twice + ("pattern p = a.causal & b.causal\n" if i == 1 else "pattern p = a.p & b.p\n")},
        )
    assert load(tmp_path / "f12.attn").default.name == "p"
    assert error_of(load, tmp_path / "f39.attn").code == "ATL106"


def test_duplicate_imports(tmp_path):
    write(tmp_path, base=BASE, main='from "base.attn" import causal, causal\npattern causal: mask = k < q\n')
    error = error_of(load, tmp_path / "main.attn")
    assert {d.code for d in error.diagnostics} == {"ATL201"}


def test_files_that_are_not_text(tmp_path):
    path = tmp_path / "x.attn"
    for data, fragment in (
        (b"\xff\xfe\x00p", "not UTF-8"),
        (b"pattern\x00", "NUL"),
        (b"# " + b"x" * 1_000_001, "larger than"),
    ):
        path.write_bytes(data)
        error = error_of(load, path)
        assert error.code == "ATL100" and fragment in error.message
    path.write_bytes(b"\xef\xbb\xbfpattern p: mask = q < k")
    assert load(path).default.name == "p"
    assert error_of(load, tmp_path).code == "ATL100"
    assert error_of(load, "a\0b").code == "ATL100"


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.attn")
    assert "regular file" in error_of(load, tmp_path / "pipe.attn").message
