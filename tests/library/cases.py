"""All cases of the library, by name: the program, or ``program/variant`` for further calls of the same one.

Executors are tested on these: ``case.instance("tiny")`` fits Triton's interpreter, ``"medium"`` has odd lengths of two
hundred and more. An instance gives ``shape``, ``params``, ``captured``, ``operands(...)``, ``dense_mask()`` and
``dense_attention(q, k, v)``.
"""

from __future__ import annotations

from library import basic_cases, bias_cases, sequence_cases, video_cases, vision_cases
from library.records import Case, Instance, Setup, Shape

__all__ = ["CASES", "Case", "Instance", "Setup", "Shape"]

CASES: dict[str, Case] = {
    **basic_cases.CASES,
    **sequence_cases.CASES,
    **bias_cases.CASES,
    **vision_cases.CASES,
    **video_cases.CASES,
}
