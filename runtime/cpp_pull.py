"""Gradients of streaming stages on the CPU backend: call the backward kernel of a plan with a pullback."""

from __future__ import annotations

from attnlang.passes.pullback import Pullback

from .call import Call
from .captured_grads import Gradients
from .errors import Unavailable
from .row_gradients import RowGradients

__all__ = ["pull"]


def pull(call: Call, pullback: Pullback, given: RowGradients, wanted: tuple[str, ...]) -> Gradients:
    """Return the gradients of q, k, v and of the captured tensors ``wanted``.

    Raises:
        Unavailable: this backend cannot run the call here.
    """
    raise Unavailable("not there yet")
