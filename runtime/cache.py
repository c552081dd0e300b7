"""The disk cache of built kernels.

An entry is a directory ``<root>/<first two letters of the key>/<key>`` that holds the built file, whatever the builder
put beside it, and a manifest with size and SHA-256 of every file. Entries appear by one ``rename`` of a finished
directory, so a reader sees all of an entry or nothing of it; an entry that does not match its manifest is built again
and never trusted. A cache directory that cannot be written is replaced, with one warning, by a private directory that
lives as long as the process.
"""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import Unavailable

try:
    import fcntl
except ImportError:  # Windows: concurrent builders then do the same work twice, which is safe
    fcntl = None  # type: ignore[assignment]

__all__ = ["Cache", "default_root"]

MANIFEST = "manifest.json"
LOCK_TIMEOUT = 120.0
"""Seconds to wait for another process that builds the same key before building it ourselves."""
STALE_AFTER = 3600.0
"""Age in seconds at which an unfinished directory left by a killed builder is removed."""
LITTLE_SPACE = 4 << 20
"""A build that fails with less free space than this, in bytes, is taken to have failed for want of space."""

_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}\Z")


def _codes(*names: str) -> frozenset[int]:
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_NO_ROOM = _codes("ENOSPC", "EDQUOT", "EROFS", "EIO")
"""Errors of a builder that another directory may cure."""
_UNWRITABLE = _NO_ROOM | _codes("EACCES", "EPERM", "ENOTDIR", "EEXIST", "ENOENT", "ENAMETOOLONG")
"""Errors of our own work in the cache directory that mean it cannot be used."""

Build = Callable[[Path], None]
Check = Callable[[Path], bool]


def default_root() -> Path:
    """Return ``ATTNLANG_CACHE_DIR``, or the platform's cache directory for attnlang."""
    if chosen := os.environ.get("ATTNLANG_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "attnlang" / "cache"
    try:
        home = Path.home()
    except RuntimeError:  # no home directory: a private directory serves this process
        return _private_root()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "attnlang"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "attnlang"


@functools.cache
def _private_root() -> Path:
    """A directory of this process alone, removed when it ends."""
    path = Path(tempfile.mkdtemp(prefix="attnlang-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def _warn_once(root: Path, reason: str) -> None:
    warnings.warn(
        f"the kernel cache {root} cannot be used ({reason}); kernels of this process go to a temporary directory. "
        "Set ATTNLANG_CACHE_DIR to a directory that can be written.",
        RuntimeWarning,
        stacklevel=5,
    )


class Cache:
    """Built files by key, shared by threads and processes.

    ``root``: directory of the cache, created when first needed; None for :func:`default_root`.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = default_root() if root is None else Path(root)

    def get_or_build(self, key: str, filename: str, build: Build, valid: Check | None = None) -> Path:
        """Return the path of ``filename`` of entry ``key``, building the entry if it is missing or damaged.

        ``build(path)`` must create the file ``path`` (named ``filename``, in an empty directory of its own) and may put
        more files beside it; it must not rely on where the directory is. ``valid(path)`` is a further check of an
        entry found on disk.

        Raises:
            Unavailable: no directory can be written at all.
            Exception: whatever ``build`` raises; nothing of a failed build stays in the cache.
        """
        name = key if _SAFE_KEY.match(key) else hashlib.sha256(key.encode()).hexdigest()
        builder_failed: list[Exception] = []

        def watched(path: Path) -> None:
            try:
                build(path)
            except Exception as error:
                builder_failed.append(error)
                raise

        try:
            return self._get_or_build(self.root, name, filename, watched, valid)
        except Exception as error:
            reason = _unwritable(error, self.root, _NO_ROOM if builder_failed else _UNWRITABLE)
            if reason is None:
                raise
            _warn_once(self.root, reason)
        try:
            return self._get_or_build(_private_root(), name, filename, build, valid)
        except OSError as error:
            raise Unavailable(f"no directory for built kernels can be written: {error}") from error

    def _get_or_build(self, root: Path, key: str, filename: str, build: Build, valid: Check | None) -> Path:
        entry = root / key[:2] / key
        if _intact(entry, filename, valid):
            return entry / filename
        with _locked(root / key[:2] / f".{key}.lock"):
            if _intact(entry, filename, valid):  # another process was faster
                return entry / filename
            return _build_entry(entry, filename, build, valid)


def _unwritable(error: Exception, root: Path, codes: frozenset[int]) -> str | None:
    """Why ``root`` cannot be used, or None when ``error`` has nothing to do with it."""
    if isinstance(error, OSError):
        inside = error.filename is None or str(error.filename).startswith(str(root))
        if error.errno in codes and inside:
            return error.strerror or type(error).__name__
    try:
        full = shutil.disk_usage(root).free < LITTLE_SPACE
    except OSError:
        return None
    return "the disk is full" if full else None


def _file_sum(path: Path) -> list[int | str]:
    data = path.read_bytes()
    return [len(data), hashlib.sha256(data).hexdigest()]


def _intact(entry: Path, filename: str, valid: Check | None) -> bool:
    """Whether ``entry`` is complete, unchanged since it was built and accepted by ``valid``."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        if filename not in manifest:
            return False
        for name, recorded in manifest.items():
            if _file_sum(entry / name) != recorded:
                return False
        return valid is None or valid(entry / filename)
    except Exception:  # whatever is wrong with an entry, building it again is the answer
        return False


def _build_entry(entry: Path, filename: str, build: Build, valid: Check | None) -> Path:
    _remove_stale(entry.parent)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=entry.parent))
    try:
        build(scratch / filename)
        if not (scratch / filename).is_file():
            raise RuntimeError(f"building cache entry {entry.name} did not create {filename}")
        files = sorted(p.name for p in scratch.iterdir() if p.is_file())
        (scratch / MANIFEST).write_text(json.dumps({name: _file_sum(scratch / name) for name in files}))
        _publish(scratch, entry, filename, valid)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return entry / filename


def _publish(scratch: Path, entry: Path, filename: str, valid: Check | None) -> None:
    """Make ``scratch`` the entry; a damaged or older entry in its place is moved away first."""
    for _ in range(10):
        try:
            os.rename(scratch, entry)
            return
        except OSError:
            if not entry.exists():
                raise
        if _intact(entry, filename, valid):
            return  # built at the same time by a process that could not take the lock
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=entry.parent))
        try:
            os.rename(entry, aside / "entry")
        except FileNotFoundError:
            pass  # another process moved it
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(errno.EIO, "entry cannot be replaced", str(entry))


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".building-*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_AFTER:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass


_thread_locks: dict[Path, threading.Lock] = {}
_thread_locks_guard = threading.Lock()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` if possible; the lock saves work, correctness does not depend on it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _thread_locks_guard:
        mutex = _thread_locks.setdefault(path, threading.Lock())
    with mutex, open(path, "wb") as file:
        _flock(file.fileno())
        yield  # closing the file releases the lock, and so does the death of the process


def _flock(descriptor: int) -> None:
    if fcntl is None:
        return
    deadline = time.monotonic() + LOCK_TIMEOUT
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return
