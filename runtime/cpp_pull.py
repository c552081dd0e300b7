"""Gradients of streaming stages on the CPU backend: call the backward kernel of a plan with a pullback."""

from __future__ import annotations

from attnlang.passes.pullback import Pullback

from .call import Call
from .captured_grads import Gradients
from .cpp_backward import launch
from .errors import Unavailable
from .row_gradients import RowGradients

__all__ = ["pull"]


def pull(call: Call, pullback: Pullback, given: RowGradients, wanted: tuple[str, ...]) -> Gradients:
    """Return the gradients of q, k, v and of the captured tensors ``wanted``.

    Raises:
        Unavailable: this backend cannot run the call here.
    """
    if call.program.standard:
        raise Unavailable("softmax attention has a backward kernel of its own")
    if call.q.numel() == 0 or call.k.numel() == 0 or call.v.numel() == 0:
        raise Unavailable("nothing to run")
    shape = call.q.shape[:3]
    inputs = {name: given.rows[name].float().expand(shape).contiguous() for name in pullback.rows(wanted)}
    inputs |= {name: given.columns[name].float().contiguous() for name in pullback.columns(wanted)}
    return launch(call, inputs, given.do, wanted)
