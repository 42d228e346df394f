"""Training of LazyStep's gates: one weight vector a site and step, the backbone frozen.

    s = sigmoid(sum_n Z_n . w)                      (s: run; 1 - s: reuse)
    out = s * F(Z) + (1 - s) * prediction from the steps before
    loss = ||model(out) - model||^2 / ||model||^2 + rho * mean over sites and rows of s

as in LazyDiT (arXiv 2412.12444; code's sign). Like there, one pair of steps is simulated, not a
rollout. Unlike there, ``rho`` is no setting. The error grows as ``c (1 - s)^2``, so that its
balance with the penalty stands at ``s = 1/2`` where ``c = rho / sites``: with ``rho`` at the
target's quantile of all ``c`` (estimated as ``-d error / ds / (2 (1 - s))``), that share of sites
and steps is reused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from accelerate_hooks import Call, Effect, Policy, Site, enable
from accelerate_hooks.history import History
from accelerate_hooks.policy import Decides

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recorder(Policy):
    """Keeps the inputs of every forward by step and branch."""

    name: ClassVar[str] = "gates_recorder"
    taken: dict[tuple[int, str], Inputs] = field(default_factory=dict)

    @property
    def kinds(self) -> Any:
        return ("model",)

    def acts(self, site: Site) -> frozenset[Effect]:
        return frozenset({Effect.OBSERVE})

    def around(self, call: Call) -> Any:
        self.taken[call.step.index, call.step.branch] = call.given()
        return call.proceed()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Mixer(Policy):
    """``mode["now"]``: ``"keep"`` computes and keeps outputs, ``"mix"`` blends what they predict in
    by the gates of step ``mode["step"]``."""

    name: ClassVar[str] = "gates_mixer"
    trains: ClassVar[bool] = True
    like: Policy
    weights: dict[str, torch.Tensor]
    mode: dict[str, Any]
    kept: dict[str, Any] = field(default_factory=dict)
    shares: list[torch.Tensor] = field(default_factory=list)

    @property
    def kinds(self) -> Any:
        return self.like.kinds

    @property
    def decides(self) -> Decides:
        return "ahead"

    def acts(self, site: Site) -> frozenset[Effect]:
        return self.like.acts(site)

    def around(self, call: Call) -> Any:
        site = call.site.name
        out = call.proceed()
        if self.mode["now"] == "keep":
            values = tuple(v for v in call.outputs(out) if v is not None)
            history = self.kept.setdefault(site, History(self.mode["order"]))
            history.add(self.mode["step"], float(self.mode["step"]), values)
            if site not in self.weights:
                width = call.x.shape[-1]
                self.weights[site] = torch.zeros(self.mode["steps"], width, requires_grad=True)
        elif self.mode["now"] == "mix":
            weight = self.weights[site][self.mode["step"]].to(call.x.device)
            s = torch.sigmoid(torch.einsum("b...d,d->b", call.x.float(), weight))
            s.retain_grad()
            self.shares.append(s)
            x, context = call.outputs(out)
            old = self.kept[site].predict(float(self.mode["step"]))
            context = None if context is None else _blend(s, context, old[1])
            out = call.replaced(out, _blend(s, x, old[0]), context)
        return out


def _blend(s: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    share = s.reshape(-1, *[1] * (new.ndim - 1)).to(new.dtype)
    return share * new + (1 - share) * old


def train(
    policy: Policy,
    pipe: Any,
    data: Iterable[Any],
    *,
    target: float,
    iterations: int,
    warmup: int,
    order: int,
    rate: float = 1e-4,
    seed: int = 0,
    resume: str | None = None,
    progress: bool = True,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gates for ``pipe`` (a callable denoising pipeline; ``data`` are keyword arguments of its
    calls): ({site: ``[steps, width]``}, what was seen on the way).

    ``resume`` is a file that keeps the state of the training; the same call goes on from there.
    """
    recorded: list[dict[tuple[int, str], Inputs]] = []
    for item in data:
        recorder = _Recorder()
        with torch.no_grad(), enable(pipe, recorder):
            pipe(**item)
        recorded.append(recorder.taken)
    model = model_of(pipe)
    steps = 1 + max(index for index, _ in recorded[0])
    branches = sorted({branch for _, branch in recorded[0]})
    weights: dict[str, torch.Tensor] = {}
    mode: dict[str, Any] = {"now": "keep", "steps": steps, "step": 0, "order": order}
    mixer = _Mixer(like=policy, weights=weights, mode=mode)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    try:
        with enable(model, mixer) as session:
            _forward(session, model, recorded[0][0, branches[0]])
            return _descend(
                session, model, mixer, recorded, branches, generator,
                target=target, iterations=iterations, warmup=warmup, rate=rate,
                resume=resume, progress=progress,
            )  # fmt: skip
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _descend(
    session: Any,
    model: Any,
    mixer: _Mixer,
    recorded: Sequence[dict[tuple[int, str], Inputs]],
    branches: list[str],
    generator: torch.Generator,
    *,
    target: float,
    iterations: int,
    warmup: int,
    rate: float,
    resume: str | None,
    progress: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights, mode = mixer.weights, mixer.mode
    optimizer = torch.optim.Adam(weights.values(), lr=rate)
    state: dict[str, Any] = {"iteration": 0, "rho": 0.0, "share": 0.0, "loss": 0.0}
    costs = torch.full((mode["steps"], len(weights)), float("nan"))
    if resume is not None and Path(resume).exists():
        saved = torch.load(resume, weights_only=True)
        state = saved["state"]
        generator.set_state(saved["generator"])
        costs.copy_(saved["costs"])
        optimizer.load_state_dict(saved["optimizer"])
        for site, weight in saved["weights"].items():
            weights[site].data.copy_(weight)
    before = mode["order"] + 1
    later = range(max(warmup, before), mode["steps"])
    bar = tqdm(
        range(state["iteration"], iterations),
        initial=state["iteration"],
        total=iterations,
        desc="gates",
        disable=not progress,
    )
    for iteration in bar:
        item, place, branch = (
            int(torch.randint(n, (), generator=generator))
            for n in (len(recorded), len(later), len(branches))
        )
        step, taken = later[place], recorded[item]
        mixer.kept.clear()
        for earlier in range(step - before, step):
            mode.update(now="keep", step=earlier)
            _forward(session, model, taken[earlier, branches[branch]])
        mode.update(now="off", step=step)
        wanted = _forward(session, model, taken[step, branches[branch]])
        mode["now"] = "mix"
        mixer.shares.clear()
        got = _forward(session, model, taken[step, branches[branch]], grad=True)
        error = (got - wanted).square().sum() / wanted.square().sum()
        shares = torch.stack([s.mean() for s in mixer.shares])
        loss = error + state["rho"] * shares.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weigh(costs[step], mixer.shares, state["rho"])
        known = torch.stack([row for row in costs if row.isfinite().all()])
        state["rho"] = len(mixer.shares) * float(known.clamp_min(0).quantile(target))
        reused = float(torch.stack([(s < 0.5).float().mean() for s in mixer.shares]).mean())
        state["share"] += 0.02 * (reused - state["share"])
        state["loss"] += 0.02 * (float(error.detach()) - state["loss"])
        state["iteration"] = iteration + 1
        bar.set_postfix(share=f"{state['share']:.2f}", rho=f"{state['rho']:.1e}")
        if resume is not None and (iteration % 50 == 49 or iteration + 1 == iterations):
            torch.save(
                {
                    "state": state,
                    "generator": generator.get_state(),
                    "costs": costs,
                    "optimizer": optimizer.state_dict(),
                    "weights": {site: w.detach() for site, w in weights.items()},
                },
                resume,
            )
    return {site: w.detach().clone() for site, w in weights.items()}, state


def weigh(costs: torch.Tensor, shares: Sequence[torch.Tensor], rho: float) -> None:
    """Move the running estimates ``costs`` (``[sites]``) of what reuse costs at a step, from the
    slope of the loss without its penalty."""
    for site, s in enumerate(shares):
        if s.grad is None:
            continue
        slope = (rho / len(shares) - s.grad * len(s)) / (2 * (1 - s.detach()).clamp_min(0.05))
        seen = slope.mean().cpu()
        old = costs[site]
        costs[site] = seen if not old.isfinite() else old + 0.3 * (seen - old)


def _forward(session: Any, model: Any, inputs: Inputs, grad: bool = False) -> torch.Tensor:
    args, kwargs = inputs
    with session.run(), torch.set_grad_enabled(grad):
        out = model(*args, **kwargs)
    while not isinstance(out, torch.Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def model_of(pipe: Any) -> Any:
    """The denoiser of a pipeline."""
    found = (getattr(pipe, name, None) for name in ("transformer", "unet"))
    return next(model for model in found if model is not None)
