"""Fitting of LazyStep's gates: one weight vector a site and step, the backbone frozen.

    reuse where  sigmoid(sum_n Z_n . w) < 1/2      (LazyDiT's gate, the sign of its code)

LazyDiT (arXiv 2412.12444) trains them by one pair of steps, each site's loss by itself. But what
reuse is off by carries a sign: along a smooth path the errors of a regular pattern cancel, and a
pattern of the sites that are cheapest one by one loses to every second step (measured). So the loss
here is that of the final sample ``x``, to first order in what each reuse is off by:

    minimise  E || sum_i z_i dx/dz_i ||^2,   z_i = 1 where site and step i are reused,
    subject to  sum_i z_i = target share,  no more than max_age reuses of a site in a row.

``v . dx/dz_i`` for a random ``v`` is one backward pass through the recorded generation, for all
sites and steps at once (each step's graph by itself: the sampler between two forwards is linear,
its coefficients are fitted to the recorded samples), and the mean of its square over ``v`` is the
norm. First order leaves out how reuses feed on each other, more so the less regular a pattern is:
so it gives candidates, from free ones to those of whole steps, each is tried on the data, and the
one nearest the full runs is kept. The gates are the ridge regression of its sign on ``sum_n Z_n``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from accelerate_hooks import Call, Effect, Policy, Site, enable
from accelerate_hooks.errors import SpecError, UnsupportedModelError
from accelerate_hooks.history import History
from accelerate_hooks.policies._pattern import allocate
from accelerate_hooks.policy import Decides
from accelerate_hooks.resume import Resume

_FEATURES = 64  # rows of features a site and step that the regression sees
_REGULAR = (0.0, 3e-4, 3e-3, 3e-2)  # prices of sites that differ within a step, in `allocate`
_SEARCHES = 3  # of each price


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recorder(Policy):
    """Keeps the arguments, input, output and time of every forward, by step and branch."""

    name: ClassVar[str] = "gates_recorder"
    time: Callable[[Call], float]
    given: dict[tuple[int, str], Any] = field(default_factory=dict)
    x: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    out: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)

    @property
    def kinds(self) -> Any:
        return ("model",)

    def acts(self, site: Site) -> frozenset[Effect]:
        return frozenset({Effect.OBSERVE})

    def around(self, call: Call) -> Any:
        key = call.step.index, call.step.branch
        self.given[key], self.x[key] = call.given(), call.x.detach().clone()
        self.times[call.step.index] = self.time(call)
        out = call.proceed()
        self.out[key] = call.outputs(out)[0].detach().clone()
        return out

    def latest(self) -> torch.Tensor:
        """The sample where the last step begins."""
        return self.x[max(self.x)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Mixer(Policy):
    """``now["mode"]``: ``"keep"`` keeps what the sites give, ``"mix"`` gives
    ``s * computed + (1 - s) * predicted`` with ``s = 1``, a leaf of the graph a site and row."""

    name: ClassVar[str] = "gates_mixer"
    trains: ClassVar[bool] = True
    like: Policy
    now: dict[str, Any]
    kept: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    shares: dict[str, torch.Tensor] = field(default_factory=dict)
    features: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def kinds(self) -> Any:
        return ("model", *self.like.kinds)

    @property
    def decides(self) -> Decides:
        return "ahead"

    def acts(self, site: Site) -> frozenset[Effect]:
        return frozenset({Effect.OBSERVE}) if site.kind == "model" else self.like.acts(site)

    def around(self, call: Call) -> Any:
        mixes, name = self.now["mode"] == "mix", call.site.name
        if call.site.kind == "model":
            if not mixes:
                return call.proceed()
            self.now["x"] = call.x.detach().requires_grad_()
            return call.proceed(x=self.now["x"])
        out = call.proceed()
        values = tuple(v for v in call.outputs(out) if v is not None)
        if not mixes:
            self.kept.setdefault((self.now["step"], self.now["branch"]), {})[name] = values
            return out
        self.features[name] = call.x.detach().float().flatten(1, -2).sum(1)
        share = self.shares[name] = torch.ones(len(call.x), requires_grad=True, device="cpu")
        old = self.predicted(name)
        mixed = [_blend(share.to(v.device), v, o) for v, o in zip(values, old, strict=True)]
        return call.replaced(out, *mixed)

    def predicted(self, name: str) -> Any:
        """From the steps before, every second one of which was reused."""
        step, order, times = self.now["step"], self.now["order"], self.now["times"]
        history = History(order)
        for earlier in _sources(step, order)[::-1]:
            kept = self.kept[earlier, self.now["branch"]][name]
            history.add(earlier, times[earlier], kept)
        return history.predict(times[step])


def _sources(step: int, order: int) -> list[int]:
    """The computed steps that a reuse at ``step`` rests on, the latest first."""
    every = 2 if step > 2 * order else 1
    return [step - 1 - every * i for i in range(order + 1)]


def _blend(s: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    share = s.reshape(-1, *[1] * (new.ndim - 1)).to(new.dtype)
    return share * new + (1 - share) * old


@dataclass
class _Seen:
    """What the sweeps have measured: ``effects`` ``[samples, steps, sites]``, each sample's scaled
    to norm one, rows of ``sum_n Z_n`` by (step, site), and the candidates' scores in dB."""

    effects: list[torch.Tensor] = field(default_factory=list)
    features: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)
    done: int = 0
    scores: list[float] = field(default_factory=list)


def train(
    policy: Policy,
    make: Callable[[dict[str, torch.Tensor]], Policy],
    pipe: Any,
    data: Iterable[Any],
    *,
    target: float,
    time: Callable[[Call], float],
    order: int,
    warmup: int,
    cooldown: int,
    max_age: int,
    probes: int,
    resume: str | None = None,
    progress: bool = True,
) -> tuple[Policy, dict[str, Any]]:
    """The policy that ``make`` makes of the best gates ({site: ``[steps, width]``}) for ``pipe``, a
    callable denoising pipeline, over generations with the keyword arguments in ``data``; and
    numbers to keep with it.

    ``probes`` random directions are asked an item. ``resume`` is a file that keeps what was
    measured; the same call goes on from there.
    """
    model, items = model_of(pipe), list(data)
    kept = Resume(resume, model=model, data=items, policy=policy, target=target, probes=probes)
    seen = _Seen(**(kept.load() or {}))

    def keep() -> None:
        kept.save(vars(seen), seen.done)

    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for place in tqdm(range(seen.done, len(items)), desc="effects", disable=not progress):
            recorder = _generate(pipe, items[place], time)
            mixer = _Mixer(like=policy, now={"order": order, "times": recorder.times})
            generator = torch.Generator().manual_seed(place)
            first = max(warmup, order + 1)
            with enable(model, mixer) as session:
                _sweep(session, model, mixer, recorder, first, probes, generator, seen)
            seen.done, seen.scores = place + 1, []
            keep()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    effects = torch.cat(seen.effects)
    steps = effects.shape[1]
    window = range(max(warmup, order + 1), steps - cooldown)
    masks = [
        allocate(effects, target=target, window=window, max_age=max_age, regular=price, seed=seed)
        for price in _REGULAR
        for seed in range(_SEARCHES)
    ]
    masks = [m for i, m in enumerate(masks) if not any(torch.equal(m, n) for n in masks[:i])]
    made = [make(_weights(seen, mask, window)) for mask in masks]
    if len(seen.scores) < len(made):
        full = [_generate(pipe, item, time).latest() for item in items]
        for candidate in tqdm(made[len(seen.scores) :], desc="trials", disable=not progress):
            runs = (_generate(pipe, item, time, candidate).latest() for item in items)
            seen.scores.append(_nearness(full, runs))
            keep()
    best = max(range(len(made)), key=seen.scores.__getitem__)
    numbers = {"reused": float(masks[best].double().mean()), "samples": len(effects) // probes}
    return made[best], numbers | {"scores": seen.scores}


def _generate(pipe: Any, item: Any, time: Callable[[Call], float], *more: Policy) -> _Recorder:
    item = dict(item)
    if isinstance(item.get("generator"), torch.Generator):  # every generation starts alike
        item["generator"] = item["generator"].clone_state()
    recorder = _Recorder(time=time)
    with torch.no_grad(), enable(pipe, [recorder, *more]):
        pipe(**item)
    return recorder


def _nearness(full: Iterable[torch.Tensor], runs: Iterable[torch.Tensor]) -> float:
    """Mean over samples of ``-10 log10 (||x - full||^2 / ||full||^2)`` where the last step begins,
    in dB."""
    values = []
    for a, b in zip(full, runs, strict=True):
        off = (b - a).flatten(1).square().sum(1)
        norm = a.flatten(1).square().sum(1)
        values.append(-10 * (off / norm).clamp_min(1e-12).log10())
    return float(torch.cat(values).mean())


def _weights(seen: _Seen, mask: torch.Tensor, window: range) -> dict[str, torch.Tensor]:
    weights = {}
    for i, site in enumerate(seen.sites):
        weights[site] = torch.zeros(
            len(mask), seen.features[window.start, site].shape[1], device="cpu"
        )
        for step in window:  # a gate of zeros runs
            weights[site][step] = _weight(seen.features[step, site], bool(mask[step, i]))
    return weights


# -- what a reuse does to the final sample -------------------------------------------------------


def _sweep(
    session: Any,
    model: Any,
    mixer: _Mixer,
    recorder: _Recorder,
    first: int,
    probes: int,
    generator: torch.Generator,
    seen: _Seen,
) -> None:
    """From the last step to ``first``: the probes, carried back through the sampler and the model,
    times what each site's reuse would be off by."""
    steps = 1 + max(recorder.times)
    if steps <= first:
        raise SpecError(
            f"lazy_step: {steps} steps are too few for gates, the first {first} are always computed"
        )
    branches = sorted({branch for _, branch in recorder.given})
    if any((step, branch) not in recorder.given for step in range(steps) for branch in branches):
        raise UnsupportedModelError(
            "lazy_step: gates are fitted on generations in which every CFG branch has a forward at "
            "every step; this one leaves some out (a guidance interval, perhaps)"
        )
    x = recorder.x[0, branches[0]]
    half = len(x) // 2
    copies = 2 if half and len(x) % 2 == 0 and torch.equal(x[:half], x[half:]) else 1
    rows = len(x) // copies
    shape = (probes, rows, *x.shape[1:])
    carried = torch.randn(shape, generator=generator, device="cpu").to(x)
    effects = torch.zeros(0, device="cpu")

    def forward(step: int, branch: str, mode: str) -> torch.Tensor:
        mixer.now.update(mode=mode, step=step, branch=branch)
        args, kwargs = recorder.given[step, branch]
        with session.run(), torch.set_grad_enabled(mode == "mix"):
            out = model(*args, **kwargs)
        while not isinstance(out, torch.Tensor):
            out = next(iter(out.values())) if isinstance(out, dict) else out[0]
        return out

    alpha, betas = 1.0, [1.0] * len(branches) * copies
    for step in reversed(range(first, steps)):
        if step + 1 < steps:
            alpha, betas = _sampler(recorder, step, branches, copies)
        back = alpha * carried
        for b, branch in enumerate(branches):
            for earlier in _sources(step, mixer.now["order"]):
                if (earlier, branch) not in mixer.kept:
                    forward(earlier, branch, "keep")
            mixer.shares.clear()
            out = forward(step, branch, "mix")
            if not effects.numel():
                seen.sites = list(mixer.shares)
                effects = torch.zeros(probes, rows, steps, len(seen.sites), device="cpu")
            for k in range(probes):
                cotangent = torch.cat([beta * carried[k] for beta in betas[b * copies :][:copies]])
                slopes = torch.autograd.grad(
                    out, [mixer.now["x"], *mixer.shares.values()], cotangent.to(out),
                    retain_graph=k + 1 < probes,
                )  # fmt: skip
                back[k] += slopes[0].reshape(copies, rows, *x.shape[1:]).sum(0)
                each = torch.stack([s.reshape(copies, rows).sum(0) for s in slopes[1:]], -1)
                effects[k, :, step] += each.float().cpu()
            for site, found in mixer.features.items():
                old = seen.features.get((step, site), found[:0].cpu())
                seen.features[step, site] = torch.cat([old, found.cpu()])[:_FEATURES]
            mixer.kept.pop((step - 1, branch))
        carried = back
    norm = effects.square().sum((0, 2, 3), keepdim=True).sqrt().clamp_min(1e-30)
    seen.effects.append((effects / norm).flatten(0, 1))


def _sampler(
    recorder: _Recorder, step: int, branches: list[str], copies: int
) -> tuple[float, list[float]]:
    """(alpha, betas) with ``x_next = alpha * x + sum betas * outputs``, by least squares."""

    def parts(values: dict[tuple[int, str], torch.Tensor], at: int, branch: str) -> Any:
        return values[at, branch].double().chunk(copies)

    x = parts(recorder.x, step, branches[0])[0]
    outs = [part for branch in branches for part in parts(recorder.out, step, branch)]
    after = parts(recorder.x, step + 1, branches[0])[0]
    if any(out.shape != x.shape for out in outs):
        raise UnsupportedModelError(
            "lazy_step: gates need a model whose output is shaped like its sample; this one gives "
            f"{tuple(outs[0].shape)} for {tuple(x.shape)}"
        )
    columns = torch.stack([t.flatten() for t in (x, *outs)], 1)
    found = torch.linalg.lstsq(columns, after.flatten()[:, None]).solution.flatten().tolist()
    return found[0], found[1:]


def _weight(features: torch.Tensor, reused: bool) -> torch.Tensor:
    """``w`` with ``Z . w`` near 1 where the site is to be run, near -1 where it is to be reused."""
    rows = features.double()
    square = rows @ rows.T
    ridge = 1e-3 * square.diag().mean() * torch.eye(len(rows), dtype=torch.float64, device="cpu")
    wanted = torch.full((len(rows),), -1.0 if reused else 1.0, dtype=torch.float64, device="cpu")
    return (rows.T @ torch.linalg.solve(square + ridge, wanted)).float()


def model_of(pipe: Any) -> Any:
    """The denoiser of a pipeline."""
    found = (getattr(pipe, name, None) for name in ("transformer", "unet"))
    return next(model for model in found if model is not None)
