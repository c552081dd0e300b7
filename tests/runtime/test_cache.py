"""The disk cache under races, crashes, damage and directories that cannot be written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from attnlang.runtime import cache as cache_module
from attnlang.runtime.cache import Cache


def write(text: str, log: Path | None = None):
    def build(path: Path) -> None:
        if log is not None:
            with open(log, "a") as file:
                file.write("built\n")
        path.write_text(text)

    return build


@pytest.fixture(autouse=True)
def forget_warnings():
    cache_module._warn_once.cache_clear()


def leftovers(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.name.startswith((".building", ".damaged"))]


def test_builds_once_and_then_finds(tmp_path):
    log = tmp_path / "log"
    cache = Cache(tmp_path / "cache")
    first = cache.get_or_build("key", "kernel.so", write("code", log))
    again = Cache(tmp_path / "cache").get_or_build("key", "kernel.so", write("other", log))
    assert first == again and again.read_text() == "code"
    assert log.read_text() == "built\n"
    assert not leftovers(tmp_path)


def test_files_beside_the_result_are_kept(tmp_path):
    def build(path: Path) -> None:
        path.write_text("binary")
        (path.parent / "kernel.cpp").write_text("source")

    path = Cache(tmp_path).get_or_build("key", "kernel.so", build)
    assert (path.parent / "kernel.cpp").read_text() == "source"


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLANG_CACHE_DIR", str(tmp_path / "here"))
    assert Cache().root == tmp_path / "here"
    monkeypatch.setenv("ATTNLANG_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().root == tmp_path / "xdg" / "attnlang"


@pytest.mark.parametrize("key", ["../../escape", "a/b", "", ".", "x" * 5000, "ü\0"])
def test_any_key_stays_inside_the_root(tmp_path, key):
    path = Cache(tmp_path / "c").get_or_build(key, "f", write("x"))
    assert path.resolve().is_relative_to((tmp_path / "c").resolve())


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "manifest gone", "directory"])
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    cache = Cache(tmp_path)
    path = cache.get_or_build("key", "f", write("good"))
    manifest = path.parent / cache_module.MANIFEST
    if damage == "truncate":
        path.write_text("go")
    elif damage == "flip":
        path.write_text("gooe")
    elif damage == "delete":
        path.unlink()
    elif damage == "manifest":
        manifest.write_bytes(b"\xff{broken")
    elif damage == "manifest gone":
        manifest.unlink()
    else:
        path.unlink()
        path.mkdir()
    assert cache.get_or_build("key", "f", write("new")).read_text() == "new"
    assert cache.get_or_build("key", "f", write("never")).read_text() == "new"
    assert not leftovers(tmp_path)


def test_an_entry_the_caller_rejects_is_built_again(tmp_path):
    cache = Cache(tmp_path)
    cache.get_or_build("key", "f", write("old format"))
    path = cache.get_or_build("key", "f", write("new"), valid=lambda p: p.read_text() == "new")
    assert path.read_text() == "new"


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(path: Path) -> None:
        path.write_text("half")
        raise ValueError("compiler says no")

    cache = Cache(tmp_path)
    with pytest.raises(ValueError, match="compiler says no"):
        cache.get_or_build("key", "f", build)
    with pytest.raises(RuntimeError, match="did not create f"):
        cache.get_or_build("key", "f", lambda path: None)
    assert not leftovers(tmp_path)
    assert cache.get_or_build("key", "f", write("good")).read_text() == "good"


def test_an_error_of_the_builder_is_not_taken_for_an_unwritable_cache(tmp_path):
    def build(path: Path) -> None:
        Path("/nonexistent/compiler").read_bytes()

    with pytest.raises(FileNotFoundError, match="compiler"):
        Cache(tmp_path).get_or_build("key", "f", build)
    with pytest.raises(FileNotFoundError):
        Cache(tmp_path).get_or_build("key", "f", lambda path: (path / "not a folder").write_text(""))


def test_threads_build_once(tmp_path):
    log = tmp_path / "log"
    cache = Cache(tmp_path / "cache")
    results: list[str] = []

    def slow(path: Path) -> None:
        write("code", log)(path)
        time.sleep(0.05)

    threads = [
        threading.Thread(target=lambda: results.append(cache.get_or_build("k", "f", slow).read_text()))
        for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == ["code"] * 8
    assert log.read_text() == "built\n"


BUILDER = """
import sys, time
from pathlib import Path
from attnlang.runtime.cache import Cache
root, log, delay = sys.argv[1:]
def build(path):
    with open(log, "a") as file:
        file.write("built\\n")
    path.write_text("half")
    print("building", flush=True)
    time.sleep(float(delay))
    path.write_text("x" * 100000)
assert len(Cache(root).get_or_build("key", "f", build).read_text()) == 100000
"""


def builder(root: Path, log: Path, delay: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(root), str(log), str(delay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_build_once_and_all_get_it(tmp_path):
    log = tmp_path / "log"
    running = [builder(tmp_path / "cache", log, 0.3) for _ in range(4)]
    assert [p.wait(60) for p in running] == [0] * 4
    assert log.read_text() == "built\n"
    assert not leftovers(tmp_path)


def test_a_killed_builder_leaves_no_entry_and_no_lock(tmp_path):
    victim = builder(tmp_path / "cache", tmp_path / "log", 60)
    assert victim.stdout is not None and victim.stdout.readline() == "building\n"
    victim.send_signal(signal.SIGKILL)
    victim.wait(10)
    start = time.monotonic()
    path = Cache(tmp_path / "cache").get_or_build("key", "f", write("good"))
    assert path.read_text() == "good"
    assert time.monotonic() - start < 10


def test_what_a_killed_builder_left_is_removed_later(tmp_path):
    old = tmp_path / "ke" / ".building-old"
    old.mkdir(parents=True)
    long_ago = time.time() - 2 * cache_module.STALE_AFTER
    os.utime(old, (long_ago, long_ago))
    Cache(tmp_path).get_or_build("key", "f", write("x"))
    assert not old.exists()


def _build_without_lock(root: str, barrier, out) -> None:
    cache_module._flock = lambda descriptor: None

    def build(path: Path) -> None:
        barrier.wait(30)  # every process is inside its build at once
        path.write_text("same")

    out.put(Cache(root).get_or_build("key", "f", build).read_text())


def test_processes_that_cannot_lock_still_agree(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, out = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_build_without_lock, args=(str(tmp_path), barrier, out)) for _ in range(3)]
    for w in workers:
        w.start()
    assert [out.get(timeout=60) for _ in workers] == ["same"] * 3
    for w in workers:
        w.join(10)
        assert w.exitcode == 0
    assert not leftovers(tmp_path)


def test_a_lock_that_never_comes_free_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "LOCK_TIMEOUT", 0.2)
    folder = tmp_path / "ke"
    folder.mkdir()
    with open(folder / ".key.lock", "wb") as held:
        cache_module.fcntl.flock(held, cache_module.fcntl.LOCK_EX)
        assert Cache(tmp_path).get_or_build("key", "f", write("x")).read_text() == "x"


def test_a_root_that_is_a_file_falls_back_with_one_warning(tmp_path):
    root = tmp_path / "file"
    root.write_text("not a directory")
    with pytest.warns(RuntimeWarning, match="cannot be used") as caught:
        first = Cache(root).get_or_build("is-file", "f", write("x"))
        second = Cache(root).get_or_build("is-file", "f", write("never"))
    assert len(caught) == 1
    assert first == second and first.read_text() == "x"
    assert root.read_text() == "not a directory"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_root_falls_back_with_one_warning(tmp_path, monkeypatch, code):
    root = tmp_path / "cache"
    real = Path.mkdir

    def mkdir(self, *args, **kwargs):
        if self.is_relative_to(root):
            raise OSError(code, os.strerror(code), str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.warns(RuntimeWarning, match=os.strerror(code)) as caught:
        path = Cache(root).get_or_build(f"read-only-{code}", "f", write("x"))
        Cache(root).get_or_build(f"read-only-{code}", "f", write("x"))
    assert len(caught) == 1
    assert path.read_text() == "x" and not path.is_relative_to(root)


def test_a_disk_that_fills_up_falls_back_and_leaves_nothing(tmp_path):
    attempts: list[Path] = []

    def build(path: Path) -> None:
        attempts.append(path)
        path.write_text("half")
        if path.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        path.write_text("whole")

    with pytest.warns(RuntimeWarning, match="No space"):
        path = Cache(tmp_path).get_or_build("full-disk", "f", build)
    assert path.read_text() == "whole" and len(attempts) == 2
    assert not leftovers(tmp_path)
    assert not (tmp_path / "fu" / "full-disk").exists()


def test_a_compiler_that_dies_for_want_of_space_falls_back(tmp_path, monkeypatch):
    class Usage:
        free = 0

    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: Usage)

    def build(path: Path) -> None:
        if path.is_relative_to(tmp_path):
            raise RuntimeError("compiler failed")
        path.write_text("x")

    with pytest.warns(RuntimeWarning, match="the disk is full"):
        assert Cache(tmp_path).get_or_build("compiler-full", "f", build).read_text() == "x"


def test_nowhere_to_write_is_unavailable(tmp_path, monkeypatch):
    def nowhere(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module.tempfile, "mkdtemp", nowhere)
    cache_module._private_root.cache_clear()
    with pytest.warns(RuntimeWarning), pytest.raises(cache_module.Unavailable, match="can be written"):
        Cache(tmp_path).get_or_build("nowhere", "f", write("x"))
    cache_module._private_root.cache_clear()
