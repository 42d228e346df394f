"""Fitting of ExpertSkip: the numbers of a rule a layer, or which experts go and how many where."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accelerate_hooks.artifact import Artifact
from accelerate_hooks.call import replace_arguments
from accelerate_hooks.enable import enable
from accelerate_hooks.errors import SpecError, UnsupportedModelError
from accelerate_hooks.frame import Root
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._evolving import acceptance, evolve
from accelerate_hooks.policies._experts import each_slot, least_slots
from accelerate_hooks.policies._hull import split
from accelerate_hooks.policies._pruning import Layer, count_of, mixtures, scores_of, survivors
from accelerate_hooks.policies._routers import chosen
from accelerate_hooks.policies._stand_ins import packed
from accelerate_hooks.policies._sums import given_by, same, untouched
from accelerate_hooks.policies._twins import router_of
from accelerate_hooks.policies._watching import Seen, Watch, calls, look, thresholds, watch
from accelerate_hooks.resume import Resume
from accelerate_hooks.site import Site

T = TypeVar("T")
_NOISE = 256  # tokens of noise a layer for LExI


def fit_rule(policy: Any, model: nn.Module, data: Any, target: float | None, progress: bool) -> Any:
    """The rule that is set, with a number a layer.

    Tried are one number for all layers, numbers that keep as many experts in each, and the split
    that changes the residual stream least, each layer by itself (which does not know what the
    layers behind make of it). Kept is what the full model accepts most of; without data or logits,
    the split.
    """
    rules = policy.rules
    if len(rules) != 1 or target is None:
        raise SpecError(
            f"expert_skip: fit finds the numbers of one rule for a target, and {len(rules)} are "
            f"set, target={target!r}; give one of {', '.join(policy.RULES)} and a mean number of "
            "experts"
        )
    rule = rules[0]
    if data is None and rule == "top_k":
        seen = _on_noise(policy, model, rule)
    elif data is None:
        raise SpecError(f"expert_skip: {rule} is fitted on data; only top_k can do without")
    else:
        data = calls(data)
        seen = watch(policy, model, data, rule, progress)
    curves = []
    for s in seen.values():
        cost, error = (v[rule].tolist() for v in (s.kept, s.error))
        curves.append(([c / s.tokens for c in cost], [-e / s.tokens for e in error]))
    costs = [cost for cost, _ in curves]
    most = max(costs, key=len)  # mixtures may ask different numbers of experts
    mean = [
        sum(cost[min(i, len(cost) - 1)] for cost in costs) / len(costs) for i in range(len(most))
    ]
    if not mean[0] <= target <= mean[-1] + 1e-9:
        raise SpecError(
            f"expert_skip: target={target!r} experts is out of range; {rule} keeps "
            f"{mean[0]:.2f} to {mean[-1]:.2f} here"
        )
    values = thresholds(rule, len(most))
    ways = {
        "split": split(curves, target * len(curves)),
        "even": [_last(cost, target) for cost in costs],
        "same": [_last(mean, target)] * len(costs),
    }
    root = _root_of(model)
    names = [s.path for s in root.sites if s.kind == "experts" and not s.visit]

    def spread(some: Sequence[T], rest: T) -> tuple[T, ...]:
        """One for each mixture; those that no data reached are left alone."""
        known = dict(zip(seen, some, strict=True))
        return tuple(known.get(name, rest) for name in names)

    tried = {w: spread([values[p] for p in ways[w]], values[-1]) for w in ways}
    accepted: dict[str, float] = {}
    made_for = {"policy": policy.name, "model": root.model, "layers": names}
    means = packed({names.index(name): s.means() for name, s in seen.items() if data is not None})
    if data is not None:
        fitness = None
        base = replace(policy, artifact=Artifact.create(means, **made_for))
        with contextlib.suppress(UnsupportedModelError):  # there are no logits
            fitness = acceptance(model, lambda plan: replace(base, **{rule: plan}), data)
        if fitness is not None:
            accepted = {way: fitness(numbers) for way, numbers in tried.items()}
    best = max(accepted, key=lambda way: accepted[way]) if accepted else "split"
    kept = spread([c[min(p, len(c) - 1)] for c, p in zip(costs, ways[best], strict=True)], mean[-1])
    artifact = Artifact.create(
        means | {
            "kept": torch.tensor(kept, device="cpu"),
            "thresholds": torch.tensor(tried[best], dtype=torch.float64, device="cpu"),
        },
        **made_for, rule=rule, target=target, way=best, esap=accepted,
        tokens=next(iter(seen.values())).tokens,
    )  # fmt: skip
    return replace(policy, **{rule: tried[best]}, artifact=artifact)


def _last(costs: Sequence[float], most: float) -> int:
    """The last place whose cost is at most ``most``; costs do not fall."""
    return max([i for i, cost in enumerate(costs) if cost <= most + 1e-9], default=0)


def _on_noise(policy: Any, model: nn.Module, rule: str) -> dict[str, Seen]:
    """LExI: every mixture by itself on normal tokens, ``X ~ N(0, 1)``."""
    with enable(model, Watch()) as session:
        found = [
            (site, list(site.around(root.model)))
            for root in session.roots
            for site in root.sites
            if site.kind == "experts" and not site.visit
        ]
    seen = {}
    for site, around in found:
        given = None if site.port.routing is None else _given_noise(site, around)
        if given is None:
            raise UnsupportedModelError(
                f"expert_skip: {site.name} ({type(site.module).__name__}) is not given indices and "
                "weights [tokens, k] where the module around it has tokens alone; fit on data, or "
                "give the numbers yourself"
            )
        seen[site.path] = _tried(policy, rule, site, *given)
    return seen


@torch.no_grad()
def _given_noise(site: Site, around: list[tuple[nn.Module, str]]) -> Any:
    """The arguments ``(args, kwargs)`` that experts get where the module around them, or the router
    alone, is given normal tokens; None where neither tells."""
    owner = next((m for m, _ in around if router_of(m)), None)
    if owner is None:
        return None
    router = getattr(owner, router_of(owner))
    matrices = [p for p in router.parameters() if p.ndim == 2]

    names = (site.port.x, *(site.port.routing or ()))

    def by_owner(x: Tensor) -> Any:
        return given_by(around, site, x)

    def by_router(x: Tensor) -> Any:
        found = chosen(router.forward(x))
        return None if found is None else ((), dict(zip(names, (x, *found), strict=True)))

    for width in dict.fromkeys(p.shape[1] for p in matrices):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_NOISE, width, generator=generator, device="cpu").to(matrices[0])
        asks = [(by_owner, x.unsqueeze(0)), (by_owner, x), (by_router, x)]
        for ask, tokens in asks:
            with contextlib.suppress(Exception), untouched(owner):  # given less than they want
                given = ask(tokens)
                if given is not None and site.port.named(*given)[names[1]].ndim == 2:
                    return given
    return None


@torch.no_grad()
def _tried(policy: Any, rule: str, site: Site, args: Any, kwargs: Any) -> Seen:
    """What leaving out slots costs at these arguments of experts."""
    port, names = site.port, site.port.routing or ()
    indices, weights = (port.named(args, kwargs)[name] for name in names)

    def run(*routing: Tensor) -> Tensor:
        changes = dict(zip(names, routing, strict=True))
        some, others = replace_arguments(port.parameters, args, kwargs, changes)
        return site.module(*some, **others)

    ys = each_slot(run, indices, weights, least_slots(run, indices, weights))
    return look(
        policy, rule, ys, indices, weights, count_of(site.module),
        normalised=bool(same(weights.sum(-1))),
    )  # fmt: skip


def fit_pruning(
    policy: Any, model: nn.Module, data: Any, target: float | None, generations: int,
    resume: str | None, progress: bool,
) -> Any:  # fmt: skip
    """What the criteria measure on ``data``; with a target, how many experts go in each layer."""
    items = calls(() if data is None else data)
    seen = watch(policy, model, items, None, progress)
    tensors: dict[str, Tensor] = {
        f"{name}.{i}": values
        for i, s in enumerate(seen.values())
        for name, values in s.scores().items()
    }
    made_for = {"policy": policy.name, "model": _root_of(model).model, "layers": list(seen)}
    fitted = replace(policy, artifact=Artifact.create(tensors, **made_for))
    if target is None:
        return fitted
    if not 0.0 < target < 1.0:
        raise SpecError(f"expert_skip: target={target!r} is out of range; give a share, 0 to 1")
    layers = _layers(policy, model)
    most = [layer.count - (layer.top_k or 1) for layer in layers]
    total = int(target * sum(layer.count for layer in layers) + 1e-9)
    masked = replace(fitted, merge=False, free_memory=False, irreversible=False)
    scores = [scores_of(fitted, layer) for layer in layers]
    accepted = acceptance(model, lambda plan: replace(masked, prune=plan), items)

    def fitness(plan: Sequence[int]) -> float:
        parts = zip(layers, scores, plan, strict=True)
        return accepted(plan) if all(x.serves(survivors(s, n)) for x, s, n in parts) else 0.0

    kept = Resume(resume, model=_root_of(model).model, data=items, policy=policy, total=total)
    plan, tried = evolve(
        fitness, most, total, generations=generations, resume=kept, progress=progress
    )  # fmt: skip
    artifact = Artifact.create(
        tensors, **made_for, target=target, removed=list(plan), esap=tried[plan], tried=len(tried)
    )
    return replace(fitted, prune=plan, artifact=artifact)


def _layers(policy: Any, model: nn.Module) -> list[Layer]:
    with enable(model, type(policy)(prune=0.0)) as session:
        return mixtures(session.sites)


def _root_of(target: Any) -> Root:
    """The first model of the target that has experts."""
    with enable(target, Watch()) as session:
        return next(r for r in session.roots if any(s.kind == "experts" for s in r.sites))


opaque_functions(globals())
