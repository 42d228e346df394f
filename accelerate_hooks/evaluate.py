"""What policies gain and what they cost: the same inputs with and without, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from accelerate_hooks import _metrics
from accelerate_hooks._contestant import Contestant, Run, contestants
from accelerate_hooks._ranking import Row, Table
from accelerate_hooks._survey import survey
from accelerate_hooks.enable import enable
from accelerate_hooks.errors import SpecError, UnsupportedModelError

__all__ = ["Contestant", "Table", "evaluate"]

Metric = Literal["drift", "psnr", "kl", "agreement"]


@dataclass
class _Seen:
    """What was measured of one contestant: seconds by item and repeat, metric by sample."""

    seconds: list[list[float]]
    values: list[float] = field(default_factory=list)
    visits: float = 0.0
    left_out: float = 0.0
    plain: float = 0.0
    saved: float = 0.0
    known: bool = True
    policy: str = ""
    never: str | None = None


def evaluate(
    model: Any,
    policies: Any,
    data: Sequence[Any],
    *,
    metric: Metric = "drift",
    repeats: int = 3,
    target: Any = None,
    reference: Run | None = None,
    peak: float = 1.0,
    by_row: bool = True,
    settle: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Table:
    """Compare policies with the plain model on the same inputs and seeds.

    model: an ``nn.Module`` or pipeline, called as ``model(**item)``, or a callable ``run(item)``
        that uses ``target``.
    policies: ``{label: contestant}`` or a list; a contestant is a policy, a spec, a list of these,
        a callable ``run(item)`` that takes the place of the plain call, or a `Contestant`.
    data: items; their ``torch.Generator`` objects start from the same state each time.
    metric: against the plain output (or ``reference(item)``), in float64: ``"drift"`` =
        ||out - ref|| / ||ref||, ``"psnr"`` = 10 log10(peak^2 / mse) in dB, ``"kl"`` =
        KL(ref || out) of the logits in nats, mean over tokens, ``"agreement"`` = share of tokens
        with the same argmax.
    repeats: timed rounds; before them one round without a clock gives outputs and counters.
    peak: the data range that PSNR refers to.
    by_row: each row of an output's first axis is a sample; else the whole output is one.
    settle: compute an item once beforehand whenever a policy is enabled, neither timed nor counted,
        since the first forward of a session is computed in full. By default for an ``nn.Module``;
        say True for a callable that makes a single forward.

    Times come from interleaved rounds (plain, A, B, plain, A, B, ...). Intervals are 95 %, by
    bootstrap: over pairs for the speed-up, over samples (the same ones for every contestant) for
    the metric. Raises SpecError for wrong arguments, UnsupportedModelError without a target.
    """
    if metric not in _metrics.METRICS:
        raise SpecError(f"metric={metric!r}; give one of {', '.join(_metrics.METRICS)}")
    for name, number, least in (("repeats", repeats, 1), ("seed", seed, 0)):
        if type(number) is not int or number < least:
            raise SpecError(f"evaluate: {name}={number!r}; give an integer of at least {least}")
    if isinstance(data, (Mapping, str)) or not isinstance(data, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(f"evaluate: data is a {type(data).__name__}; give a list of items")
    items = list(data)
    if not items:
        raise SpecError("evaluate needs at least one item in data")
    plain = _plain_run(model)
    if not _is_function(model) and not all(isinstance(item, Mapping) for item in items):
        raise SpecError(
            f"evaluate: an item for {type(model).__name__} is a dict of keyword arguments; give "
            "a list of these"
        )
    where = model if target is None and not _is_function(model) else target
    settle = isinstance(model, nn.Module) if settle is None else settle
    entries = {"plain": Contestant(), **contestants(policies)}
    if where is None and any(c.policy is not None for c in entries.values()):
        raise UnsupportedModelError(
            "evaluate got a callable and policies: say with target= which module or pipeline the "
            "policies act on"
        )
    seen = {label: _Seen([[] for _ in items]) for label in entries}
    bench = _Bench(plain, where, settle, seed, _states(items))
    rounds = [-1, *range(repeats)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for number, i in _steps(rounds, len(items), progress):
            expected: Any = None
            if number < 0 and reference is not None:
                expected = bench.once(Contestant(run=reference), items, i)
            for label, contestant in entries.items():
                if number >= 0:
                    seen[label].seconds[i].append(bench.timed(contestant, items, i))
                    continue
                out = bench.once(contestant, items, i, seen[label])
                expected = out if expected is None else expected
                values = _metrics.compare(metric, out, expected, peak, by_row)
                seen[label].values += values
    return _table(entries, seen, metric, peak, len(items), repeats, seed)


class _Bench:
    def __init__(
        self, plain: Run, target: Any, settle: bool, seed: int, states: list[list[Any]]
    ) -> None:
        self.plain, self.target, self.settle = plain, target, settle
        self.seed, self.states = seed, states

    def _restart(self, i: int) -> None:
        torch.manual_seed(self.seed + i)
        for generator, state in self.states[i]:
            generator.set_state(state)

    @contextmanager
    def _ready(self, contestant: Contestant) -> Generator[Any]:
        with nullcontext() if contestant.setup is None else contestant.setup():
            if contestant.policy is None:
                yield None
                return
            session = enable(self.target, contestant.policy)
            try:
                yield session
            finally:
                session.disable()

    def once(
        self, contestant: Contestant, items: list[Any], i: int, seen: _Seen | None = None
    ) -> Any:
        """The output of an item; what was skipped goes to ``seen``."""
        run = contestant.run or self.plain
        with self._ready(contestant) as session:
            before = _counts(session) if self._settled(session, run, items, i) else None
            self._restart(i)
            out = _metrics.output(_metrics.detached(run(items[i])))
            if session is not None and seen is not None:
                _count(_counts(session), before, seen)
        return out

    def _settled(self, session: Any, run: Run, items: list[Any], i: int) -> bool:
        if session is None or not self.settle:
            return False
        self._restart(i)
        run(items[i])
        return True

    def timed(self, contestant: Contestant, items: list[Any], i: int) -> float:
        """Seconds of an item, without what a session does once (counting, watching)."""
        run = contestant.run or self.plain
        with self._ready(contestant) as session:
            if session is not None:
                session.counting = False
            self._settled(session, run, items, i)
            self._restart(i)
            _synchronize()
            start = time.perf_counter()
            run(items[i])
            _synchronize()
            return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _counts(session: Any) -> dict[str, Any]:
    found = survey(session)
    totals = found["totals"]
    return {
        "policy": " + ".join(found["policies"]),
        "never": found["never"],
        "known": totals["flops_plain"] is not None,
        "visits": totals["visits"],
        "left_out": totals["visits"] * (totals["share_skipped"] or 0.0),
        "plain": totals["flops_plain"] or 0.0,
        "saved": totals["flops_saved"],
    }


def _count(counts: dict[str, Any], before: dict[str, Any] | None, seen: _Seen) -> None:
    seen.policy, seen.known = counts["policy"], seen.known and counts["known"]
    for name in ("visits", "left_out", "plain", "saved"):
        change = counts[name] - (before[name] if before else 0.0)
        setattr(seen, name, getattr(seen, name) + change)
    if not seen.left_out:
        seen.never = counts["never"]


def _table(
    entries: dict[str, Contestant],
    seen: dict[str, _Seen],
    metric: str,
    peak: float,
    items: int,
    repeats: int,
    seed: int,
) -> Table:
    base = seen["plain"].seconds
    rows = []
    for label, one in seen.items():
        ratios = [
            a / b
            for times, others in zip(base, one.seconds, strict=True)
            for a, b in zip(times, others, strict=True)
        ]
        low, high = _metrics.interval(ratios, seed, middle=True)
        value = sum(one.values) / len(one.values)
        value_low, value_high = _metrics.interval(one.values, seed)
        acts = entries[label].policy is not None
        rows.append(
            Row(
                label=label,
                policy=one.policy,
                seconds=statistics.median(statistics.median(times) for times in one.seconds),
                speedup=statistics.median(ratios),
                speedup_low=low,
                speedup_high=high,
                visits_skipped=one.left_out / one.visits if acts and one.visits else None,
                flops_skipped=one.saved / one.plain if acts and one.known and one.plain else None,
                value=value,
                value_low=value_low,
                value_high=value_high,
                samples=len(one.values),
                note=f"never skipped: {one.never}" if one.never and not one.left_out else "",
            )
        )
    values = {label: one.values for label, one in seen.items()}
    return Table(
        metric, rows, values, _metrics.spread(base), peak, items, repeats, seed, torch.__version__
    )


def _plain_run(model: Any) -> Run:
    """How to compute an item plainly."""
    if isinstance(model, nn.Module):
        if model.training:
            raise UnsupportedModelError("the model is in training mode; call model.eval() first")
        return lambda item: model(**item)
    if not callable(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no nn.Module, pipeline or callable run(item)"
        )
    return model if _is_function(model) else lambda item: model(**item)


def _is_function(model: Any) -> bool:
    return not isinstance(model, nn.Module) and not hasattr(model, "components")


def _states(items: list[Any]) -> list[list[Any]]:
    """The generators in each item, with the state that they have now."""
    return [[(g, g.get_state()) for g in _generators(item)] for item in items]


def _generators(node: Any) -> Iterator[torch.Generator]:
    if isinstance(node, torch.Generator):
        yield node
    elif isinstance(node, Mapping):
        for child in node.values():
            yield from _generators(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _generators(child)


def _steps(rounds: list[int], items: int, progress: bool) -> Iterator[tuple[int, int]]:
    places = [(number, i) for number in rounds for i in range(items)]
    if not progress:
        return iter(places)
    from tqdm import tqdm

    return iter(tqdm(places, desc="evaluate", unit="item"))
