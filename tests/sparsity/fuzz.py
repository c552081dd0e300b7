"""Fuzz the soundness of the tile analysis: many random mask programs against brute force, with a progress bar.

    python tests/sparsity/fuzz.py                  200,000 programs from seed 0, on two processes
    python tests/sparsity/fuzz.py --seed 123       that one program, printed in full

Each seed is one program with its own lengths, tile, parameters and tensors, always the same. A violation is a tile
called empty that holds a True, or full that holds a False; it is printed with its seed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

import torch
from mask_programs import Maker, Problem, brute_force, missed, violations

from attnlang.ir import format_expr
from attnlang.sparsity import EMPTY, FULL, PARTIAL, analyse

CHUNK = 250
SAID = 10_000  # programs between two lines where there is no terminal to draw on
Found = tuple[int, str]


def problem(seed: int) -> Problem:
    return Maker(Random(seed)).problem()


def run(seeds: range) -> tuple[int, int, int, list[Found]]:
    """Return programs done, truly empty or full tiles, how many of them were proved, and what went wrong."""
    torch.set_num_threads(1)
    decided = proved = 0
    bad: list[Found] = []
    for seed in seeds:
        try:
            made = problem(seed)
            exact = brute_force(made)
            claimed = analyse(*made.arguments, made.tile).dense_kinds()
            if wrong := violations(claimed, exact):
                bad.append((seed, f"{wrong} wrong tile(s): {format_expr(made.program.mask)}"))
            sure = int((exact != PARTIAL).sum())
            decided, proved = decided + sure, proved + sure - sum(missed(claimed, exact))
        except Exception as error:  # a program that cannot be analysed is a defect as well
            bad.append((seed, f"{type(error).__name__}: {error}"))
    return len(seeds), decided, proved, bad


def chunks(first: int, count: int) -> Iterator[range]:
    for at in range(first, first + count, CHUNK):
        yield range(at, min(at + CHUNK, first + count))


def fuzz(first: int, count: int, jobs: int) -> list[Found]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    begin, decided, proved, done = time.perf_counter(), 0, 0, 0
    bad: list[Found] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool, Progress(*columns, console=console) as bar:
        task = bar.add_task("programs", total=count)
        for n, sure, found, wrong in pool.imap_unordered(run, chunks(first, count)):
            done, decided, proved = done + n, decided + sure, proved + found
            for seed, text in wrong:
                bar.console.print(f"seed {seed}: {text}", markup=False, highlight=False)
            bad += wrong
            bar.update(task, advance=n, description=f"programs, {len(bad)} violations")
            if not console.is_terminal and done % SAID == 0:
                print(f"{done:,} of {count:,} programs, {len(bad)} violations", file=sys.stderr, flush=True)
    print(
        f"{done:,} programs, {len(bad)} violations, {proved / max(1, decided):.2%} of {decided:,} empty or full tiles "
        f"proved, {time.perf_counter() - begin:.0f} s"
    )
    return bad


def show(seed: int) -> list[Found]:
    """Print one program and its tiles: what is true and what was claimed."""
    made = problem(seed)
    print(format_expr(made.program.mask))
    print(dict(made.sizes), dict(made.params), f"tile {made.tile}")
    for name, tensor in made.tensors.items():
        print(f"{name} = {tensor.tolist()}")
    names = {EMPTY: ".", PARTIAL: "+", FULL: "#"}
    exact, claimed = brute_force(made), analyse(*made.arguments, made.tile).dense_kinds()
    for what, kinds in (("exact", exact), ("claimed", claimed)):
        for b, h in ((b, h) for b in range(kinds.shape[0]) for h in range(kinds.shape[1])):
            print(f"{what}, b = {b}, h = {h}")
            print("\n".join("".join(names[int(kind)] for kind in row) for row in kinds[b, h]))
    return run(range(seed, seed + 1))[3]


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the soundness of the tile analysis.")
    parser.add_argument("--programs", type=int, default=200_000, help="how many (default 200,000)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--seed", type=int, help="only this program, printed in full")
    given = parser.parse_args()
    if given.seed is not None:
        return bool(show(given.seed))
    return bool(fuzz(given.first, given.programs, given.jobs))


if __name__ == "__main__":
    sys.exit(main())
