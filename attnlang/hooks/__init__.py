"""What a program states, in Python: mask, score, normalisers, weights, outputs, branches, groups and stages.

``program`` traces it; the other functions make what it is given (``specs``), or stand inside of the functions that are
traced (``inside``).
"""

from .grid import grid
from .inside import dropout, max_d, mean_d, random, sum_d
from .program import program
from .specs import (
    attend,
    branch,
    dot,
    elementwise,
    entmax15,
    normalizer,
    output,
    pool,
    rows,
    select,
    softmax,
    sparsemax,
    stat,
)

__all__ = [
    "attend",
    "branch",
    "dot",
    "dropout",
    "elementwise",
    "entmax15",
    "grid",
    "max_d",
    "mean_d",
    "normalizer",
    "output",
    "pool",
    "program",
    "random",
    "rows",
    "select",
    "softmax",
    "sparsemax",
    "stat",
    "sum_d",
]
