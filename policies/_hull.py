"""The best split of one budget over many concave curves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def hull(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """The places of the points on the upper concave hull, from the first to the last; ``x`` does
    not fall."""
    kept: list[int] = []
    for i in range(len(x)):
        if kept and x[i] <= x[kept[-1]]:
            continue
        while len(kept) > 1 and slope(x, y, kept[-2], kept[-1]) <= slope(x, y, kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def slope(x: Sequence[float], y: Sequence[float], a: int, b: int) -> float:
    return (y[b] - y[a]) / (x[b] - x[a])


def split(curves: Sequence[tuple[Sequence[float], Sequence[float]]], budget: float) -> list[int]:
    """A point of each curve ``(cost, gain)``, such that the costs add up to at most ``budget`` and
    the gains to as much as the points of the hulls allow, climbed steepest piece of all first.

    Each curve begins with what it costs at least, whatever the budget is.
    """
    hulls = [hull(cost, gain) for cost, gain in curves]
    chosen = [points[0] for points in hulls]
    spent = sum(cost[first] for (cost, _), first in zip(curves, chosen, strict=True))
    pieces = sorted(
        (-slope(cost, gain, a, b), number, b, cost[b] - cost[a])
        for number, ((cost, gain), points) in enumerate(zip(curves, hulls, strict=True))
        for a, b in itertools.pairwise(points)
    )
    full: set[int] = set()
    for _, number, b, price in pieces:
        if number in full:
            continue
        if spent + price > budget + 1e-9:
            full.add(number)  # what comes after on this curve lies behind this piece
            continue
        chosen[number] = b
        spent += price
    return chosen
