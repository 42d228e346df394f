"""How many experts to take out of each layer: evolution, with acceptance as fitness.

EvoESAP (arXiv 2603.06003): the order in which the experts of a layer go is given; a plan is how
many go in each, its fitness the mean of `kernels.esap` between the full and the pruned model's next
token on some data.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_hooks.enable import enable
from accelerate_hooks.errors import SpecError, UnsupportedModelError
from accelerate_hooks.kernels import esap
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._watching import forward, tokens_of
from accelerate_hooks.policy import Policy
from accelerate_hooks.resume import Resume

Plan = tuple[int, ...]
_ELITE, _MOVES, _MOST, _TRIES = 4, 3, 4, 32


def evolve(
    fitness: Callable[[Plan], float],
    most: Sequence[int],
    total: int,
    *,
    population: int = 32,
    generations: int = 50,
    seed: int = 0,
    resume: Resume | None = None,
    progress: bool = True,
) -> tuple[Plan, dict[Plan, float]]:
    """The fittest plan found, and the fitness of all that were tried.

    A plan takes ``0 <= plan[l] <= most[l]`` experts out of layer l, ``total`` in all. The first
    plans are regular ones (even, rising, falling, middle, alternating) and random ones; each next
    generation keeps the four fittest and fills up with mutations of one of them: up to three moves
    of up to four experts from one layer to another. No plan is tried twice. ``resume`` keeps what
    was tried, so that a killed search goes on from there.
    """
    from tqdm import tqdm

    if type(generations) is not int or generations < 1:
        raise SpecError(f"expert_skip: generations={generations!r}; give an integer of at least 1")
    if not 0 <= total <= sum(most):
        raise SpecError(
            f"expert_skip: {total} experts cannot be taken out of layers that can spare "
            f"{sum(most)} in all; give a smaller target"
        )
    chance = random.Random(seed)
    tried: dict[Plan, float] = dict((resume.load() if resume else None) or {})
    shapes = itertools.islice(_shapes(len(most), chance), population)
    plans = list(dict.fromkeys(_filled(shape, most, total, chance) for shape in shapes))
    bar = tqdm(range(generations), desc="budgets", disable=not progress)
    for _ in bar:
        for plan in plans:
            if plan not in tried:
                tried[plan] = fitness(plan)
                if resume is not None:
                    resume.save(tried)
        elite = sorted(plans, key=lambda p: -tried[p])[:_ELITE]
        bar.set_postfix_str(f"{tried[elite[0]]:.4f}")
        plans = list(elite)
        for _ in range(8 * population):
            if len(plans) >= population:
                break
            child = _mutated(chance.choice(elite), most, chance)
            if child not in plans:
                plans.append(child)
    best = max(tried, key=lambda p: tried[p])
    return best, tried


def _shapes(layers: int, chance: random.Random) -> Iterator[list[float]]:
    """Shares of the layers to begin with."""
    ramp = [(i + 1) / layers for i in range(layers)]
    yield [1.0] * layers
    yield ramp
    yield ramp[::-1]
    yield [1.0 - abs(2 * r - 1) + 0.1 for r in ramp]
    yield [abs(2 * r - 1) + 0.1 for r in ramp]
    yield [1.0 + i % 2 for i in range(layers)]
    yield [2.0 - i % 2 for i in range(layers)]
    while True:
        yield [chance.random() + 0.1 for _ in range(layers)]
        if layers == 1:
            return


def _filled(
    shares: Sequence[float], most: Sequence[int], total: int, chance: random.Random
) -> Plan:
    """A plan near ``shares``: one expert at a time, where the layer lags its share most."""
    plan = [0] * len(most)
    whole = sum(shares)
    for _ in range(total):
        open_ = [i for i in range(len(most)) if plan[i] < most[i]]
        lag = [total * shares[i] / whole - plan[i] for i in open_]
        best = max(lag)
        plan[chance.choice([i for i, d in zip(open_, lag, strict=True) if d >= best - 1e-9])] += 1
    return tuple(plan)


def _mutated(plan: Plan, most: Sequence[int], chance: random.Random) -> Plan:
    new = list(plan)
    for _ in range(min(chance.randint(1, _MOVES), chance.randint(1, _MOVES))):
        for _ in range(_TRIES):
            here, there = chance.randrange(len(new)), chance.randrange(len(new))
            count = chance.randint(1, _MOST)
            if here != there and count <= new[here] and new[there] + count <= most[there]:
                new[here] -= count
                new[there] += count
                break
    return tuple(new)


def acceptance(
    model: nn.Module, make: Callable[[Any], Policy], data: Iterable[Any]
) -> Callable[[Any], float]:
    """The fitness of a plan: the mean `esap` over the tokens of ``data`` that are no padding. The
    full model's logits are kept on the CPU, in its dtype."""
    items = list(data)
    if not items:
        raise SpecError("expert_skip: fit needs at least one item in data")
    with torch.no_grad():
        outputs = [getattr(forward(model, item), "logits", None) for item in items]
    full = [logits.cpu() for logits in outputs if isinstance(logits, Tensor)]
    if len(full) < len(items):
        raise UnsupportedModelError(
            f"expert_skip: {type(model).__name__} gives no logits to compare; give the numbers "
            "yourself, or fit without a target"
        )

    def fitness(plan: Any) -> float:
        total, count = 0.0, 0.0
        with enable(model, make(plan)), torch.no_grad():
            for item, logits in zip(items, full, strict=True):
                mask = _tokens(item, logits)
                shares = esap(forward(model, item).logits.cpu(), logits)
                total += (shares * mask).sum(dtype=torch.float64).item()
                count += mask.sum(dtype=torch.float64).item()
        return total / max(count, 1.0)

    return fitness


def _tokens(item: Any, logits: Tensor) -> Tensor:
    mask = tokens_of(item)
    if mask is None or mask.shape != logits.shape[:2]:
        return torch.ones(logits.shape[:2], device="cpu")
    return mask.cpu().float()


opaque_functions(globals())
