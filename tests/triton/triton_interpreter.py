"""Triton's interpreter without work that it does again and again: tests run thousands of small kernels in it.

What is replaced is pure, or done and undone for every launch, so results are the same. What a version of Triton does
not have is left alone.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["hurried", "without_overflow_checks"]


def _rewriter() -> Callable[[Any], Any]:
    """Rewrite all functions of a generated file at once: to find the text of one takes longer than to compile it."""
    original = interpreter.FunctionRewriter.rewrite_ast
    known: dict[str, dict[str, Any]] = {}

    def rewrite_ast(self: Any) -> Any:
        fn = self.fn
        if not fn.__module__.startswith("attnlang_generated."):
            return original(self)
        path = fn.__code__.co_filename
        if path not in known:
            tree = ast.parse(Path(path).read_text(encoding="utf-8"))
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
            for node in tree.body:
                node.decorator_list = []
            tree = ast.fix_missing_locations(self.ast_transformer.visit(tree))
            for name, value in vars(interpreter).items():
                fn.__globals__.setdefault(name, value)
            known[path] = {}
            exec(compile(tree, path, "exec"), fn.__globals__, known[path])
        return known[path][fn.__name__]

    return rewrite_ast


class _Lasting:
    """The scope of a patched language that stays patched."""

    def restore(self) -> None:
        pass


def _once_patched() -> tuple[Callable[[Any], Any], Callable[[], None]]:
    """Patch each module of the language for the first function that sees it, and a function that undoes all."""
    original = interpreter._patch_lang
    scopes: list[Any] = []
    done: set[tuple[bool, bool]] = set()

    def patch_lang(fn: Any) -> Any:
        known = fn.__globals__
        seen = ("tl" in known, "core" in known)  # the names that modules have for what is patched
        if seen not in done:
            scopes.append(original(fn))
            done.add(seen)
        return _Lasting()

    def undo() -> None:
        while scopes:
            if (scope := scopes.pop()) is not None:  # older versions undo nothing
                scope.restore()

    return patch_lang, undo


def _numpy_types() -> Callable[[Any], Any]:
    """The NumPy dtype of a Triton dtype, remembered by name: two of one name are equal."""
    original = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        if isinstance(dtype, tl.pointer_type | tl.block_type):
            return original(dtype)
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = original(dtype)
        return found

    return get_np_dtype


def _block_types() -> Callable[..., None]:
    """Fill in a block type from one that has the same element type and shape; nothing changes a type later."""
    original = tl.block_type.__init__
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        try:
            key = (element_ty.name, tuple(n if type(n) is int else n.value for n in shape))
            found = known.get(key)
        except (AttributeError, TypeError):
            return original(self, element_ty, shape)
        if found is None:
            original(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(found)
        return None

    return init


def _tensors() -> Callable[..., None]:
    """Fill in a tensor from what its type says, remembered with the type."""
    original = tl.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        found = vars(type).get("_of_tensors")
        if found is None:
            original(self, handle, type)
            type._of_tensors = {n: v for n, v in vars(self).items() if n != "handle"}
        else:
            self.handle = handle
            vars(self).update(found)

    return init


@contextmanager
def hurried() -> Iterator[None]:
    """Interpret kernels with less work until the end of the block."""
    with ExitStack() as stack:
        patch_lang, undo = _once_patched()
        stack.callback(undo)
        for where, name, made in (
            (interpreter, "_patch_lang", lambda: patch_lang),
            (interpreter.FunctionRewriter, "rewrite_ast", _rewriter),
            (interpreter, "_get_np_dtype", _numpy_types),
            (tl.block_type, "__init__", _block_types),
            (tl.tensor, "__init__", _tensors),
        ):
            if hasattr(where, name):
                stack.enter_context(patch.object(where, name, made()))
        yield


@contextmanager
def without_overflow_checks() -> Iterator[None]:
    """Do not compute every sum and product of ints again in 64 bits: numbers of small random programs are small."""
    builder = interpreter.interpreter_builder
    options = getattr(builder, "options", None)
    if options is None or not hasattr(options, "sanitize_overflow"):
        yield
        return
    with patch.object(builder, "options", dataclasses.replace(options, sanitize_overflow=False)):
        yield
