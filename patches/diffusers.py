"""diffusers: denoisers of a pipeline, noise levels of its scheduler."""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from typing import Any

from torch import nn

from accelerate_hooks.patch import LayoutRule, Pipeline
from accelerate_hooks.patches import grids
from accelerate_hooks.patches.structural import StructuralPatch

FIRST_ORDER = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler")
DENOISERS = ("transformer", "transformer_2", "unet", "unet_2", "prior", "decoder")


class DiffusersPatch(StructuralPatch):
    def matches(self, model: nn.Module) -> bool:
        return type(model).__module__.partition(".")[0] == "diffusers" or any(
            base.__module__.startswith("diffusers.") for base in type(model).__mro__
        )

    def layout_of(self, model: nn.Module) -> LayoutRule | None:
        return grids.layout_of(model)

    def noise(self, scheduler: Any) -> list[tuple[float, float]]:
        """Flow matching: ``alpha = 1 - sigma``. Otherwise the model sees a sample of variance one:
        ``alpha = sqrt(alphas_cumprod[t])``, or ``1 / sqrt(1 + s^2)`` for a scheduler in Karras'
        ``s = sigma / alpha``. One that steps to levels between its sigmas (KDPM2) has them at its
        timesteps: ``log s`` is linear between those it was trained at."""
        sigmas = getattr(scheduler, "sigmas", None)
        products = getattr(scheduler, "alphas_cumprod", None)
        steps = len(scheduler.timesteps)
        if getattr(scheduler, "sigmas_interpol", None) is not None and products is not None:
            ratios = _at([math.log((1.0 - p) / p) / 2 for p in _floats(products)], scheduler)
            return [(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in map(math.exp, ratios)]
        if self.prediction(scheduler) == "velocity" and sigmas is not None:
            return [(1.0 - s, s) for s in _floats(sigmas)[:steps]]
        if sigmas is not None and len(sigmas) >= steps:
            return [(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in _floats(sigmas)[:steps]]
        if products is None:
            return []
        kept = [_floats(products)[round(t)] for t in _floats(scheduler.timesteps)]
        return [(math.sqrt(p), math.sqrt(1.0 - p)) for p in kept]

    def strides(self, scheduler: Any) -> list[float]:
        """Euler on a flow: ``x += (sigma' - sigma) v``. DDIM and Euler on noise predictions:
        ``x / alpha += (sigma' / alpha' - sigma / alpha) epsilon``."""
        stochastic = _config(scheduler).get("stochastic_sampling")
        if type(scheduler).__name__ not in FIRST_ORDER or stochastic:
            return []
        levels = [*self.noise(scheduler), (1.0, 0.0)]
        kind = self.prediction(scheduler)
        if kind == "velocity":
            sigmas = [sigma for _, sigma in levels]
            own = getattr(scheduler, "sigmas", None)
            if own is not None and len(own) == len(levels):
                sigmas[-1] = float(own[-1])  # 1 where a scheduler counts the other way
            return [b - a for a, b in itertools.pairwise(sigmas)]
        if kind == "epsilon" and all(alpha > 0 for alpha, _ in levels):
            ratios = [sigma / alpha for alpha, sigma in levels]
            return [b - a for a, b in itertools.pairwise(ratios)]
        return []

    def prediction(self, scheduler: Any) -> str | None:
        config = _config(scheduler)
        kind = config.get("prediction_type")
        if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
            return "velocity"
        return {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}.get(kind)


def _config(scheduler: Any) -> Any:
    return getattr(scheduler, "config", None) or {}


def _floats(values: Any) -> list[float]:
    return [float(v) for v in values.tolist()]


def _at(trained: list[float], scheduler: Any) -> list[float]:
    """Values at the scheduler's timesteps, linear between the timesteps of training."""
    last = len(trained) - 1
    found = []
    for t in _floats(scheduler.timesteps):
        low = min(max(math.floor(t), 0), last)
        high = min(low + 1, last)
        found.append(trained[low] + (t - low) * (trained[high] - trained[low]))
    return found


def pipeline_of(target: Any) -> Pipeline | None:
    """The denoisers and the scheduler of a ``DiffusionPipeline``: what has a usual name, and what
    else is given a timestep, but for ControlNets, whose residuals are no output of a step. None
    for anything else."""
    parts = {n: p for n, p in _components(target).items() if isinstance(p, nn.Module)}
    named = [name for name in DENOISERS if name in parts]
    timed = [name for name in parts if name not in DENOISERS and _takes_time(parts[name])]
    models = {n: parts[n] for n in named + timed if not n.startswith("controlnet")}
    if not models:
        return None
    notes = [
        f"{name} ({type(parts[name]).__name__}): computes plainly at each step, since its outputs "
        "are residuals"
        for name in timed
        if name not in models
    ]
    scheduler = getattr(target, "scheduler", None)
    usable = hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")
    return Pipeline(models, scheduler if usable else None, weakref.ref(target), notes)


def _components(target: Any) -> dict[str, Any]:
    found = getattr(target, "components", None)
    if not isinstance(found, dict):
        return {}
    more = {name: getattr(target, name, None) for name in DENOISERS}
    return found | {name: part for name, part in more.items() if part is not None}


def _takes_time(model: nn.Module) -> bool:
    plain = getattr(model, "_orig_mod", model)
    names = inspect.signature(type(plain).forward).parameters
    return any(name in names for name in DiffusersPatch.timesteps)
