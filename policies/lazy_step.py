"""LazyStep: leave work out of a denoising step and predict what it would have given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch

from accelerate_hooks.artifact import Artifact
from accelerate_hooks.call import Call
from accelerate_hooks.errors import ArtifactError, SpecError, UnsupportedModelError
from accelerate_hooks.history import History, RowHistory, Values, relative_error
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._pace import Board, Pace, State, minus, plus
from accelerate_hooks.policies._quantity import clock, converted, present, restored
from accelerate_hooks.policy import Decides, Policy
from accelerate_hooks.site import Effect, Kind, Site

Scope = Literal["model", "stack", "site"]
Predictor = Literal["hold", "linear", "taylor2", "taylor3"]
Criterion = Literal["cadence", "change", "error", "gates"]

_ORDER = {"hold": 0, "linear": 1, "taylor2": 2, "taylor3": 3}
_WHY = {
    "cadence": "not its turn",
    "change": "change under threshold",
    "error": "error under tolerance",
    "gates": "gate closed",
}
_FITTED = ("predictor", "time")  # what gates rest on
_PRESETS: dict[str, dict[str, Any]] = {
    "safe": {"tolerance": 0.03, "threshold": 0.04, "every": 2, "max_age": 1},
    "balanced": {"tolerance": 0.03, "threshold": 0.08, "every": 3, "max_age": 8},
    "fast": {"tolerance": 0.05, "threshold": 0.12, "every": 4, "max_age": 12},
}


@dataclass(frozen=True, kw_only=True)
class LazyStep(Policy):
    """Reuse across denoising steps: compute some, predict the others from them.

    scope: ``"model"`` leaves the whole model out of a step; ``"stack"`` computes the first block
        and leaves out the rest of the stack; ``"site"`` decides for attention and MLP each by
        itself (for the block where these are no modules).
    predictor: ``"hold"`` the last value, ``"linear"``, ``"taylor2"``, ``"taylor3"``: the polynomial
        through the last 1 to 4 computed values at their true distances in time.
    criterion: ``"cadence"`` computes every ``every``-th step and reads nothing; ``"change"`` skips
        while the relative change of the decision tensor, accumulated since the last computed step,
        is under ``threshold``; ``"error"`` measures at each computed step what the prediction would
        have been off by, and skips while the error foretold from that is under ``tolerance``;
        ``"gates"`` asks learned gates (``fit``).
    time: the predictor's axis, the scheduler's ``"sigma"`` or its ``"log_snr"``, else step numbers.
    quantity: predict the model's ``"output"``, or convert it to the ``"clean"`` sample or the
        ``"noise"`` and back (scope ``"model"`` with a known scheduler).
    tolerance, threshold, every, max_age: by ``preset`` where not given; ``max_age`` bounds the
        steps that in a row go without computing.
    warmup, cooldown: the first and last steps, always computed (the last ones where it is known how
        many there are: a pipeline, ``session.run(total)``).
    corrector: at the next computed step, take back what the skipped ones were off by, as far as
        that step shows (scope ``"model"``, first-order solvers such as Euler and DDIM).
    metric: how ``"change"`` is measured, relative ``"l1"`` distance or ``"cosine"`` distance.
    lagged: decide all sites of a step from what the step before showed, with one host read a
        forward instead of one a site (scope ``"site"``, criterion ``"change"`` or ``"error"``).
    max_cache_bytes: above it the cached values are dropped and the step is computed.

    Without settings: 2.8 times fewer FLOPs at 60.5 dB (drift 0.003) against the full run of 50
    Euler steps, on the model that ships with the demo (benchmarks/results/lazy_step.md; the sweep
    behind ``predictor``, ``time`` and ``quantity`` is lazy_step_sweep.md).

    Source: LazyDiT (arXiv 2412.12444) for gates and reuse; the error control is that of an adaptive
    ODE solver.
    """

    name: ClassVar[str] = "lazy_step"

    preset: Literal["safe", "balanced", "fast"] = "balanced"
    scope: Scope = "model"
    predictor: Predictor = "linear"
    criterion: Criterion = "error"
    time: Literal["sigma", "log_snr", "index"] = "log_snr"
    quantity: Literal["output", "clean", "noise"] = "output"
    metric: Literal["l1", "cosine"] = "l1"
    tolerance: float | None = None
    threshold: float | None = None
    every: int | None = None
    max_age: int | None = None
    warmup: int = 3
    cooldown: int = 2
    corrector: bool = True
    lagged: bool = False
    max_cache_bytes: int | None = None
    artifact: Artifact | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in _CHOICES.items():
            wanted = f"one of {', '.join(map(repr, allowed))}"
            self.require(name, getattr(self, name) in allowed, wanted)
        for name in ("tolerance", "threshold"):
            value = getattr(self, name)
            ok = value is None or (math.isfinite(value) and value >= 0)
            self.require(name, ok, "a finite number of at least 0")
        if self.criterion == "gates" and self.threshold is not None:
            self.require("threshold", 0.0 < self.threshold < 1.0, "a number between 0 and 1")
        self.require("every", self.every is None or self.every >= 1, "an integer of at least 1")
        self.require("max_age", self.max_age is None or self.max_age >= 0, "an integer >= 0")
        self.require("warmup", self.warmup >= 0, "an integer >= 0")
        self.require("cooldown", self.cooldown >= 0, "an integer >= 0")
        ok = self.max_cache_bytes is None or self.max_cache_bytes > 0
        self.require("max_cache_bytes", ok, "a positive number of bytes")
        ok = self.criterion != "gates" or self.scope == "site"
        self.require("scope", ok, "scope='site': criterion='gates' has one gate a site")
        ok = self.quantity == "output" or self.scope == "model"
        self.require("quantity", ok, "'output', or scope='model' with it")
        ok = self.metric == "l1" or self.criterion == "change"
        self.require("metric", ok, "'l1', or criterion='change' with it")
        ok = self.scope == "site" and self.criterion in ("change", "error")
        wanted = "False, or scope='site' and criterion='change' or 'error' with it"
        self.require("lagged", ok or not self.lagged, wanted)

    # -- settings ----------------------------------------------------------------------------

    def setting(self, name: str) -> Any:
        """A setting, from the preset where it was not given; gates are fitted for a ``max_age`` of
        one step."""
        value = getattr(self, name)
        if value is None and self.criterion == "gates" and name == "max_age":
            return 1
        return _PRESETS[self.preset][name] if value is None else value

    @classmethod
    def exact(cls) -> Self:
        return cls(max_age=0)

    @classmethod
    def example(cls) -> Self:
        return cls(criterion="cadence", every=2, predictor="hold", warmup=1, cooldown=0)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        if self.scope == "model":
            return ("model",)
        return ("block",) if self.scope == "stack" else ("attention", "mlp", "block")

    @property
    def decides(self) -> Decides:
        if self.criterion == "cadence":
            return "ahead"
        return "step" if self.scope != "site" or self.lagged else "site"

    def acts(self, site: Site) -> frozenset[Effect]:
        if self.scope == "site":
            whole = not {"attention", "mlp"} <= site.parts
            if whole != (site.kind == "block"):
                return frozenset()
        return frozenset({Effect.SKIP})

    def check(self, session: Any) -> list[str]:
        if not any(root.denoises for root in session.roots):
            names = ", ".join(type(root.model).__name__ for root in session.roots)
            raise UnsupportedModelError(
                f"{names} takes no timestep, and lazy_step reuses what was computed at earlier "
                "denoising steps; give it a diffusion model or pipeline"
            )
        if self.criterion != "gates":
            return []
        if self.artifact is None:
            raise ArtifactError(
                "lazy_step: criterion='gates' needs an artifact; make one with "
                "LazyStep(scope='site', criterion='gates').fit(pipe, data, target=0.4)"
            )
        for root in session.roots:
            self.artifact.check(policy=self.name, model=root.model)
        for name, value in self.artifact.meta.get("settings", {}).items():
            if getattr(self, name) != value:
                raise ArtifactError(
                    f"lazy_step: these gates were fitted with {name}={value!r}, not "
                    f"{getattr(self, name)!r}; use that, or fit again"
                )
        return []

    def fit(
        self,
        model: Any,
        data: Any,
        *,
        target: float | None = 0.4,
        resume: str | None = None,
        progress: bool = True,
        probes: int = 4,
    ) -> Self:
        """Fit the gates of ``model``, a denoising pipeline, its weights frozen.

        data: keyword arguments of a few calls of the pipeline (``[{"prompt": ...}, ...]``), all
            with one number of steps, which is the number that the gates are good for.
        target: share of (step, site) visits to reuse.
        resume: a file that keeps what was measured so far, so that a killed fit goes on from there.
        probes: random directions asked a call, each by a backward pass through its generation.

        Returns a policy with an artifact; ``artifact.save(path)`` keeps it.
        """
        from accelerate_hooks.policies import _gates

        share = 0.4 if target is None else target
        if not 0.0 < share < 1.0:
            raise SpecError(f"lazy_step: target={target!r} is out of range; give 0 < target < 1")
        mould = replace(self, scope="site", criterion="gates", lagged=False, artifact=None)
        rests = {name: getattr(self, name) for name in _FITTED}

        def make(weights: dict[str, torch.Tensor], **numbers: Any) -> Self:
            artifact = Artifact.create(
                weights,
                policy=self.name,
                model=_gates.model_of(model),
                steps=len(next(iter(weights.values()))),
                scheduler=type(model.scheduler).__name__,
                settings=rests,
                **numbers,
            )
            return replace(mould, artifact=artifact)

        fitted, numbers = _gates.train(
            mould, make, model, data, target=share, order=_ORDER[self.predictor],
            time=lambda call: clock(call.step, self.time),
            warmup=self.warmup, cooldown=self.cooldown, max_age=mould.setting("max_age"),
            probes=probes, resume=resume, progress=progress,
        )  # fmt: skip
        return make(dict(fitted.artifact.tensors), **numbers)

    # -- one visit ---------------------------------------------------------------------------

    def around(self, call: Call) -> Any:
        if call.step.phase != "denoise":
            return call.proceed()
        self._tell_too_few(call)
        if self.scope == "stack":
            return self._stack(call)
        if self.criterion == "gates":
            return self._gated(call)
        return self._whole(call)

    def _whole(self, call: Call) -> Any:
        """The model, or a site: left out as a whole."""
        state = call.slot(self._state, rows=True)
        pace = call.slot(Pace, scope="run") if self.scope == "model" else state.pace
        history, time = state.history, clock(call.step, self.time)
        if self.lagged:
            boards: dict[str, Board] = call.slot(dict, scope="run")
            boards.setdefault(call.step.branch, Board()).settle(call, pace)
        self._decide(call, pace, (call.x,))
        if self._can_predict(call, pace, history):
            self._say(call, pace, history)
            if call.step.stride is not None:
                state.owed.append((time, call.step.stride))
            return call.skip(*restored(call, self.quantity, history.predict(time)))
        out = call.proceed()
        try:
            values = converted(call, self.quantity, call.outputs(out))
        except UnsupportedModelError as error:  # a list of residuals, as ControlNets give
            call.inert(f"lazy_step: nothing is reused: {error}")
            return out
        factor = state.settle_debt(time, call.step.stride)
        corrected = out
        if self.corrector and self.scope == "model" and self.quantity == "output" and factor:
            (y,), (guess,) = values, history.predict(time)
            corrected = call.replaced(out, torch.lerp(guess, y, 1.0 + factor))
        self._learn(call, pace, history, time, values)
        return corrected

    def _stack(self, call: Call) -> Any:
        """The blocks behind the first one: decided once a forward from what the first one adds,
        replaced by what they added together."""
        index, time = call.step.index, clock(call.step, self.time)
        paces: dict[str, Pace] = call.slot(dict, scope="run")
        pace = paces.setdefault(call.step.branch, Pace())
        if pace.step != index:
            out = call.proceed()
            self._decide(call, pace, minus(call.outputs(out), (call.x, call.context)))
            return out
        call.settle()
        states: list[State] = call.slot(list, scope="stack", rows=True)
        if not states:
            states.extend(self._segments(call))
        state = next(s for s in states if s.last >= call.site.index)
        last = call.site.index == state.last
        if self._can_predict(call, pace, state.history):
            if not last:
                return call.skip(alone=False)
            self._say(call, pace, state.history)
            return call.skip(
                *plus((call.x, call.context), state.history.predict(time)), alone=False
            )
        state.enter(index, (call.x, call.context))
        out = call.proceed()
        state.leave(call.outputs(out))
        if last:
            added = state.added(call.outputs(out))
            if added is None:
                state.history.clear()
                call.note("changed in place between blocks: what these add is not known")
            else:
                self._learn(call, pace, state.history, time, added)
        return out

    def _segments(self, call: Call) -> Iterator[State]:
        """One state for each unbroken run of the stack's blocks: one that ``only`` leaves out has
        to see what those before it added."""
        indices = [site.index for site in call.peers()]
        for here, after in zip(indices, [*indices[1:], None], strict=True):
            if after != here + 1:
                yield State(_ORDER[self.predictor], last=here)

    def _gated(self, call: Call) -> Any:
        """A site whose rows are run or reused as its learned gate says: run where
        ``sigmoid(sum_n Z_n . w) >= threshold``, 0.5 where none is given (the code's sign in
        LazyDiT, not the paper's)."""
        history = call.slot(lambda: RowHistory(_ORDER[self.predictor]))
        index, time = call.step.index, clock(call.step, self.time)
        weight = self._gate(call)
        if weight is None or not history.ready or not self._in_window(call):
            out = call.proceed()
            history.add(index, time, present(call.outputs(out)))
            return out
        logits = torch.einsum("b...d,d->b", call.x.float(), weight)
        share = 0.5 if self.threshold is None else self.threshold
        bound, most = math.log(share / (1.0 - share)), self.setting("max_age")
        ages = history.ages(index)
        rows = [  # a NaN is run
            not logit < bound or age > most
            for logit, age in zip(call.read_rows(logits), ages, strict=True)
        ]
        if all(rows):
            out = call.proceed()
        else:
            guess = history.predict(time)
            call.note(_WHY[self.criterion], age=float(max(ages)))
            if not any(rows):
                return call.skip(*guess)
            out = call.proceed(rows=rows, rest=guess)
        history.add(index, time, present(call.outputs(out)), rows)
        return out

    # -- decisions ---------------------------------------------------------------------------

    def _state(self) -> State:
        return State(_ORDER[self.predictor])

    def _gate(self, call: Call) -> torch.Tensor | None:
        """The gate of this site and step, None where it has none."""
        artifact, step = self.artifact, call.step
        if artifact is None or call.site.name not in artifact.tensors:
            return None
        weights = artifact.tensors[call.site.name]
        if step.total is not None and step.total != len(weights):
            raise ArtifactError(
                f"lazy_step: these gates were fitted for {len(weights)} steps, this run has "
                f"{step.total}; fit again, or generate with num_inference_steps={len(weights)}"
            )
        return weights[step.index].to(call.x.device) if step.index < len(weights) else None

    def _in_window(self, call: Call) -> bool:
        step = call.step
        if step.run.ambiguous is not None or step.index < self.warmup:
            return False
        return step.total is None or step.index < step.total - self.cooldown

    def _tell_too_few(self, call: Call) -> None:
        """At the first step: say it if none of the steps there are can be left out, or if nobody
        knows which are the last."""
        total = call.step.total
        if call.step.index or self.setting("max_age") == 0:
            return
        if total is None:
            if self.cooldown:
                call.remark(
                    "lazy_step: the number of steps is not known, so the last ones are reused like "
                    "any; enable the pipeline with its scheduler, or use session.run(total)"
                )
            return
        first = max(self.warmup, _ORDER[self.predictor] + 1 + (self.criterion == "error"))
        if total - self.cooldown <= first:
            call.inert(
                f"lazy_step: {total} steps are too few, all are computed: the first {first} and "
                f"the last {self.cooldown} always are (warmup={self.warmup}, predictor="
                f"{self.predictor!r}, criterion={self.criterion!r}, cooldown={self.cooldown})"
            )

    def _decide(self, call: Call, pace: Pace, seen: Values) -> None:
        """Settle, once a step, whether it is left out. ``seen`` is the decision tensor: the input
        of the model or site, what the first block adds in a stack."""
        if pace.step == call.step.index:
            return
        pace.enter(call.step.index)
        watches = self.criterion == "change"
        if watches and not self.lagged:
            pace.watch(seen, self.metric)
        ready = pace.computed > _ORDER[self.predictor] and 0 < pace.age <= self.setting("max_age")
        pace.skip = ready and self._in_window(call) and self._within(call, pace)
        if not pace.skip:
            pace.restart()
        if watches and self.lagged:
            pace.watch(seen, self.metric)

    def _within(self, call: Call, pace: Pace) -> bool:
        """Does the criterion allow this step to be left out?"""
        if self.criterion == "cadence":
            return pace.age < self.setting("every")
        if not self.lagged:
            pace.read(call)
        if self.criterion == "change":
            return pace.change_since(self.lagged) < self.setting("threshold")
        return pace.age < pace.choose_span(self.setting("tolerance"), _ORDER[self.predictor])

    def _can_predict(self, call: Call, pace: Pace, history: History) -> bool:
        """A branch or stack that was missing when the others were computed is not predicted."""
        return pace.skip and history.ready and 0 < history.age(call.step.index) <= pace.age

    def _learn(self, call: Call, pace: Pace, history: History, time: float, values: Values) -> None:
        """Keep what was computed, and what the prediction of it would have been off by."""
        measures = self.criterion == "error" and not pace.skip
        if measures and history.ready and time not in history.times:
            pace.measured.append(relative_error(history.predict(time), values))
        history.add(call.step.index, time, values)

    def _say(self, call: Call, pace: Pace, history: History) -> None:
        age = float(history.age(call.step.index))
        if self.criterion in ("error", "change"):
            call.note(_WHY[self.criterion], age=age, estimate=pace.expected)
        else:
            call.note(_WHY[self.criterion], age=age)


_CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(_PRESETS),
    "scope": ("model", "stack", "site"),
    "predictor": tuple(_ORDER),
    "criterion": ("cadence", "change", "error", "gates"),
    "time": ("sigma", "log_snr", "index"),
    "quantity": ("output", "clean", "noise"),
    "metric": ("l1", "cosine"),
}


opaque_functions(globals())
