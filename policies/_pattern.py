"""Which steps and sites to reuse, given what each reuse does to the final sample."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import accumulate

import torch

from accelerate_hooks.errors import SpecError

_HEAT = 0.05


def allocate(
    effects: torch.Tensor,
    *,
    target: float,
    window: range,
    max_age: int,
    regular: float = 0.0,
    seed: int = 0,
    tries: int | None = None,
) -> torch.Tensor:
    """Which (step, site) to reuse, a mask ``[steps, sites]``: a share ``target`` of all, inside
    ``window``, such that the mean square of ``sum z * effects`` (``[samples, steps, sites]``) is
    small, and after ``max_age`` steps with a reuse comes one without: what the effects do not show
    is that sites which take turns feed on each other's errors. First whole steps, then sites, where
    one that differs from others of its step costs ``regular`` times what the whole
    steps did."""
    steps, sites = effects.shape[1:]
    mask = torch.zeros(steps, 1, dtype=torch.bool, device="cpu")
    mask[regular_pattern(window, math.ceil(target * steps), max_age)] = True
    tries = 40 * steps * sites if tries is None else tries
    chance = random.Random(seed)
    gram = _gram(effects.sum(2, keepdim=True))
    mask = _anneal(mask, gram, window, max_age, chance, tries)
    z = mask.flatten().double()
    price = regular * float(z @ gram @ z) / sites
    mask = mask.expand(steps, sites).clone()
    most, flat = round(target * steps * sites), mask.view(-1)
    for place in chance.sample(flat.nonzero().flatten().tolist(), max(0, int(flat.sum()) - most)):
        flat[place] = False
    gram = _gram(effects)
    differ = (
        sites * torch.eye(sites, dtype=torch.float64, device="cpu") - 1
    )  # z' differ z = on * (sites - on)
    gram += price * torch.block_diag(*[differ] * steps)
    return _anneal(mask, gram, window, max_age, chance, tries)


def regular_pattern(window: range, count: int, max_age: int) -> list[int]:
    """``count`` of the steps in ``window``, ``max_age`` in a row."""
    most = max_age * (len(window) + 1) // (max_age + 1)
    if count > most:
        raise SpecError(
            f"lazy_step: {count} steps are to be reused, but warmup and cooldown leave "
            f"{len(window)}, of which max_age={max_age} allows {most}; give a smaller target"
        )
    groups = len(window) - count + 1  # between the computed steps
    sizes = [count // groups + (i < count % groups) for i in range(groups)]
    return [
        s for s in window if (s - window.start + 1) not in set(accumulate(n + 1 for n in sizes))
    ]


def _gram(effects: torch.Tensor) -> torch.Tensor:
    """Mean products of effects; few samples are trusted less where effects should cancel."""
    flat = effects.double().flatten(1)
    gram = flat.T @ flat / len(flat)
    return gram + torch.diag(gram.diag()) * (len(gram) / len(flat))


def _anneal(
    mask: torch.Tensor,
    gram: torch.Tensor,
    window: range,
    max_age: int,
    chance: random.Random,
    tries: int,
) -> torch.Tensor:
    """Moves: one reuse elsewhere; all reuses of a span of steps one step on or back, at one site or
    at all."""
    sites = mask.shape[1]
    on = mask.clone()
    pull = gram @ on.flatten().double()
    cost = float(on.flatten().double() @ pull)
    best, kept = cost, on.clone()
    heat = _HEAT * cost

    def proposals() -> Iterator[list[tuple[int, int]]]:
        """(place, +1 or -1) to switch."""
        while True:
            site, step = chance.randrange(sites), chance.choice(window)
            if chance.random() < 0.5:
                there, other = chance.choice(window), chance.randrange(sites)
                if on[step, site] and not on[there, other]:
                    yield [(step * sites + site, -1), (there * sites + other, 1)]
                continue
            by, length = chance.choice((-1, 1)), chance.choice((1, 1, 2, 4, 8))
            some = range(sites) if chance.random() < 0.5 else (site,)
            span = range(step, min(step + length, window.stop))
            moved = [(s, k) for s in span for k in some if on[s, k]]
            after = {(s + by, k) for s, k in moved}
            if not moved or any(s not in window for s, _ in after):
                continue
            before = set(moved)
            if any(on[s, k] for s, k in after - before):
                continue
            yield [(s * sites + k, -1) for s, k in before - after] + [
                (s * sites + k, 1) for s, k in after - before
            ]

    for number, change in enumerate(proposals()):
        if number >= tries:
            break
        places = torch.tensor([p for p, _ in change], device="cpu")
        signs = torch.tensor([float(s) for _, s in change], dtype=torch.float64, device="cpu")
        rise = float(2 * signs @ pull[places] + signs @ gram[places][:, places] @ signs)
        warm = heat * (1 - number / tries) ** 2
        if rise > 0 and (warm <= 0 or chance.random() >= math.exp(-rise / warm)):
            continue
        flat = on.view(-1)
        flat[places] = signs > 0
        if _too_long(on.any(1).tolist(), max_age):
            flat[places] = signs < 0
            continue
        pull += gram[:, places] @ signs
        cost += rise
        if cost < best:
            best, kept = cost, on.clone()
    return kept


def _too_long(column: list[bool], most: int) -> bool:
    """Whether more than ``most`` in a row are set."""
    length = 0
    for value in column:
        length = length + 1 if value else 0
        if length > most:
            return True
    return False
