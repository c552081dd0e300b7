"""Programs with groups, and with outputs that a key spreads over buckets, as text."""

from __future__ import annotations

from attnlang.grammar import parse
from attnlang.ir import Program

__all__ = ["PROGRAMS", "SHARP"]

TEXT = """
pattern softmax_in_groups(label: int[B, Lk], gate: float[B, Lq, 3]):
    \"\"\"Keys of label -1 are in no group and take no weight; nobody has label 2.\"\"\"
    mask = k <= q + 9 and label[b, k] >= 0
    group = label[b, k]
    groups = 3
    normalize:
        stat top = max(s, by=group)
        stat part = sum(exp(s - top), by=group)
        weight = exp(s - top) / part
    weights = w * gate[b, q, label[b, k]]
    output spread = part * exp(top)

pattern groups_of_pairs(slope: float[H]):
    \"\"\"Groups by distance; a row statistic takes part, and a seed.\"\"\"
    mask = k <= q and q % 7 > 0
    score = s + slope[h] * (k - q)
    group = min((q - k) // 12, 2)
    groups = 3
    normalize:
        stat m = max(s)
        stat own = sum(exp(s - m), by=group, seed=exp(slope[h] - m))
        stat l = sum(exp(s - m) * own)
        stat all = sum(exp(s - m))
        weight = exp(s - m) * own / l
    output shares = own / all
    output entropy = sum(-w * log(w), over=k)

pattern distances:
    \"\"\"Two histograms by distance, one of them by two keys, beside ordinary attention.\"\"\"
    mask = k <= q and q > 1
    output near = sum(w, over=k, key=min((q - k) // 4, 5), extent=6)
    output both = sum(w * float(q - k), over=k, key=((q - k) % 3 - 1, k // 32), extent=(2, 3))

pattern rows_in_buckets:
    normalize = elementwise(sigmoid(s), divisor=count)
    output o = sum(w * V, over=k, key=(q + k) % 3, extent=3)

pattern columns(slot: int[Lq]):
    mask = k <= q
    output maps = sum(w, over=q, key=slot[q], extent=2)
    output received = sum(w, over=q)

pattern block_sums:
    mask = abs(q - k) < 30
    output total = sum(w * w, over=(q, k))
    output blocks = sum(w, over=(q, k), key=(k // 16, q // 32), extent=(5, 3))
    output bands = sum(w * s, over=(q, k), key=q // 32, extent=2)
    output by_distance = sum(w, over=(q, k), key=(q - k + 30) // 16, extent=4)

pattern block_maxima:
    values = none
    mask = k <= q
    output maxima = max(w, over=(q, k), key=(q // 32, k // 16), extent=(3, 5), empty=-2.0)
    output highest = max(s, over=k, key=k // 16, extent=5, empty=-3.0)
"""

_PATTERNS = parse(TEXT).patterns
PROGRAMS: dict[str, Program] = dict(_PATTERNS)
SHARP = ("block_maxima",)
"""Programs whose gradients go to the pair that made an extremum."""
