"""Densities a head for DraftAttention: measured curves, and the best split of a mean density."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from accelerate_hooks.attention import Attention
from accelerate_hooks.call import Call
from accelerate_hooks.enable import enable
from accelerate_hooks.errors import SpecError
from accelerate_hooks.kernels import attention_mass
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._hull import hull, slope
from accelerate_hooks.policy import Policy
from accelerate_hooks.resume import Resume
from accelerate_hooks.site import Effect, Kind, Site

GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)


@dataclass
class Curve:
    """Of one layer: the mass kept ``[heads, len(GRID)]`` at each density, summed over visits, and
    the densities themselves: of blocks that may be left out, as ``sparsity`` counts them, those
    kept by name (the diagonal, sinks) included."""

    kept: Tensor
    density: Tensor
    visits: int = 1

    def add(self, kept: Tensor, density: Tensor) -> None:
        self.kept = self.kept + kept
        self.density = self.density + density
        self.visits += 1


@dataclass(frozen=True, kw_only=True)
class Probe(Policy):
    """Looks at attention as ``policy`` would choose its blocks, and computes it in full."""

    name: ClassVar[str] = "draft_attention_probe"
    policy: Any = None
    every: int = 1
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("attention",)

    @classmethod
    def exact(cls) -> Self:
        return cls()

    example = exact

    def acts(self, site: Site) -> frozenset[Effect]:
        return frozenset({Effect.REPLACE})

    def around(self, call: Call) -> Any:
        if call.step.index % self.every or self.policy.dense(call) is not None:
            return call.proceed()
        return call.attention(lambda a: self._look(call, a))

    def _look(self, call: Call, a: Attention) -> Tensor:
        policy = self.policy
        seen = policy.prepare(call, a)
        if seen is not None and seen[0].selection.free.any():
            plan, q, k, _, key_mask, scale = seen
            draft = policy.draft(call, plan, q, k, scale, key_mask)
            mass = attention_mass(
                q, k, plan.block, scale=scale, is_causal=a.is_causal, key_mask=key_mask
            )
            masks = [plan.selection.choose(draft, share) for share in GRID]
            kept = torch.stack([plan.kept(mass, m, key_mask).mean(0) for m in masks], -1)
            free = plan.selection.free.to(q.device)
            density = torch.stack([m[..., free].double().mean((0, 2)) for m in masks], -1)
            name = call.site.name
            if name in self.curves:
                self.curves[name].add(kept.cpu(), density.cpu())
            else:
                self.curves[name] = Curve(kept.cpu(), density.cpu())
        return a.default()


def measure(
    policy: Policy,
    model: Any,
    data: Any,
    *,
    visits: int,
    resume: str | None,
    progress: bool,
) -> dict[str, Curve]:
    """The curves of every layer over the calls of ``data``."""
    from tqdm import tqdm

    if type(visits) is not int or visits < 1:
        raise SpecError(f"draft_attention: visits={visits!r}; give an integer of at least 1")
    alone = isinstance(data, Mapping) or not isinstance(data, Iterable)
    items = [data] if alone else list(data)
    if not items or not all(isinstance(item, Mapping) for item in items):
        raise SpecError(
            "draft_attention: data to fit on is keyword arguments of the model or pipeline, of one "
            f"call or a list of at least one, not {data!r:.60}"
        )
    kept = Resume(resume, model=model_of(model), data=items, policy=policy, visits=visits)
    curves, first = _resumed(kept)
    for number, item in enumerate(tqdm(items, desc="densities", disable=not progress)):
        if number < first:
            continue
        steps = item.get("num_inference_steps") if isinstance(item, Mapping) else None
        every = max(1, math.ceil(steps / visits)) if steps else 1
        with enable(model, Probe(policy=policy, every=every, curves=curves)), torch.no_grad():
            model(**item)
        state = {name: vars(curve) for name, curve in curves.items()}
        kept.save((number + 1, state), number + 1)
    if not curves:
        raise SpecError(
            "draft_attention: no attention was measured: all of it is masked, to another sequence "
            "or one block long"
        )
    return curves


def _resumed(kept: Resume) -> tuple[dict[str, Curve], int]:
    first, curves = kept.load() or (0, {})
    return {name: Curve(**values) for name, values in curves.items()}, first


def allocate(curves: dict[str, Curve], target: float) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Shares ``[heads]`` of each layer that keep the most mass at a mean density of ``target``.

    The upper concave hull of every head's curve is climbed piece by piece, steepest piece of all
    first: the best split of a sum of concave functions.
    """
    pieces: list[tuple[float, float, str, int, int]] = []
    shares = {
        name: torch.full(curve.kept.shape[:1], GRID[0], device="cpu").double()
        for name, curve in curves.items()
    }
    spent, heads = 0.0, 0
    for name, curve in curves.items():
        kept, density = (t.double() / curve.visits for t in (curve.kept, curve.density))
        for head in range(len(kept)):
            points = hull(density[head].tolist(), kept[head].tolist())
            spent += density[head][0].item()
            heads += 1
            for a, b in itertools.pairwise(points):
                x, y = density[head].tolist(), kept[head].tolist()
                pieces.append((-slope(x, y, a, b), x[b] - x[a], name, head, b))
    if spent > target * heads:
        raise SpecError(
            f"draft_attention: target={target:.3g} is out of reach: what is kept by name (the "
            f"diagonal, sinks, one block a row) is a density of {spent / heads:.3g} here; give "
            "more, or smaller regions with pool="
        )
    for _, width, name, head, b in sorted(pieces):
        room = target * heads - spent
        if room <= 0:
            break
        low, part = shares[name][head].item(), min(1.0, room / width)
        shares[name][head] = low + part * (GRID[b] - low)
        spent += part * width
    mean = torch.cat([c.density.double() / c.visits for c in curves.values()]).mean(0).tolist()
    same = _inverse(mean, GRID, target)
    equal = sum(_at(curve, torch.full_like(shares[name], same)) for name, curve in curves.items())
    fitted = sum(_at(curve, shares[name]) for name, curve in curves.items())
    return shares, {"mass_equal": equal / heads, "mass_fitted": fitted / heads}


def _inverse(values: Sequence[float], places: Sequence[float], wanted: float) -> float:
    """The greatest place at which rising ``values`` reach ``wanted``, by linear interpolation."""
    last = max(i for i, value in enumerate(values) if value <= wanted + 1e-12)
    if last == len(values) - 1:
        return places[-1]
    part = (wanted - values[last]) / (values[last + 1] - values[last])
    return places[last] + max(0.0, part) * (places[last + 1] - places[last])


def _at(curve: Curve, shares: Tensor) -> float:
    """The mass that all heads together keep at ``shares``, by linear interpolation."""
    grid = torch.tensor(GRID, dtype=torch.float64, device="cpu")
    kept = curve.kept.double() / curve.visits
    place = torch.searchsorted(grid, shares.double().contiguous()).clamp(1, len(GRID) - 1)
    part = (shares.double() - grid[place - 1]) / (grid[place] - grid[place - 1])
    low, high = (kept.gather(1, p.unsqueeze(1)).squeeze(1) for p in (place - 1, place))
    return torch.lerp(low, high, part.clamp(0, 1)).sum().item()


def model_of(target: Any) -> nn.Module:
    """The module that an artifact is made for: the target, or a pipeline's denoiser."""
    with enable(target, Probe()) as session:
        return session.roots[0].model


opaque_functions(globals())
