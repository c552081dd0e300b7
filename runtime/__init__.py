"""Running programs: binding of arguments, build, cache, launch, autograd and the eager executor."""

from .errors import Unavailable

__all__ = ["Unavailable"]
