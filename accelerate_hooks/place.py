"""Where a forward stands: the `Step` that its policies see."""

from __future__ import annotations

from typing import Any

import torch

from accelerate_hooks import stand_in, tree
from accelerate_hooks.clock import Clock
from accelerate_hooks.frame import Root
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.run import Run, Step
from accelerate_hooks.schedule import Schedules
from accelerate_hooks.site import TOKENS

SEVERAL = (
    "several session.run() are open and nothing tells whose forward this is; open each in a with "
    "statement of the function or generator that makes its forwards"
)


def step_of(root: Root, schedules: Schedules, arguments: dict[str, Any]) -> Step:
    patch, recogniser = root.patch, root.recogniser
    timestep = next((arguments[n] for n in patch.timesteps if arguments.get(n) is not None), None)
    if timestep is None:
        return _step_of_sequence(root, schedules, arguments)
    x = arguments.get(root.site.port.x)
    first = next(tree.leaves(x), ((), None))[1]
    shape = None if first is None else (tuple(first.shape), first.dtype, str(first.device))
    given = [arguments[n] for n in patch.conditions if isinstance(arguments.get(n), torch.Tensor)][
        :1
    ]
    clock = Clock.read(timestep)
    moment = None if clock is None else clock.value
    declared = schedules.explicit.get()
    if len(declared) > 1:
        run = Run(signal="session.run()", index=0, ambiguous=SEVERAL)
        return Step(run, 0, None, "denoise", root.name or "main", run.signal, timestep, moment)
    explicit = declared[0] if declared else None
    schedule = schedules.current.get()
    run, index, branch, signal = recogniser.of_loop(
        shape,
        clock,
        given,
        schedules.context_name.get(),
        schedule,
        explicit,
    )
    known = schedule if schedule is not None and schedule.run is run else None
    if known is None and schedule is not None and run is explicit:
        # a pipeline inside a declared run: its scheduler was set after that began
        inside = not schedule.run.ended and schedule.run.number > run.number
        known = schedule if inside else None
    return Step(
        run,
        index,
        known.left() if run.total is None and known is not None else run.total,
        "denoise",
        f"{root.name} {branch}" if root.name else branch,
        signal,
        timestep,
        moment if known is None or known.one_way else None,
        noise=known.level(clock) if known else None,
        prediction=known.prediction if known else None,
        stride=known.stride(clock) if known else None,
    )


def _step_of_sequence(root: Root, schedules: Schedules, arguments: dict[str, Any]) -> Step:
    _, cache = cache_of(arguments)
    declared = schedules.explicit.get()
    explicit = declared[0] if len(declared) == 1 else None
    positions = arguments.get("position_ids")
    length = length_of(arguments)
    if cache is None:
        run = Run(signal="forward", index=0)
        can_cache = arguments.get("use_cache") is not False and length > 0
        phase = "prefill" if can_cache else "encode"
        if len(declared) > 1:
            run.ambiguous = SEVERAL
        if explicit is not None and not (can_cache and explicit.cached):  # else of another cache
            explicit.index += 1
            run = explicit
        return Step(run, run.index, None, phase, root.name or "main", run.signal)
    run = root.recogniser.of_cache(cache, explicit)
    phase = "decode" if length == 1 and run.index > 0 else "prefill"
    return Step(run, run.index, None, phase, root.name or "main", run.signal, positions=positions)


def length_of(arguments: dict[str, Any]) -> int:
    """How many tokens a forward of a language model is given, 0 where it is given none."""
    x = next((arguments[n] for n in TOKENS if isinstance(arguments.get(n), torch.Tensor)), None)
    return 0 if x is None or x.ndim < 2 else x.shape[1]


def cache_of(arguments: dict[str, Any]) -> tuple[str | None, Any]:
    for name in stand_in.NAMES:
        value = arguments.get(name)
        if value is not None and stand_in.is_cache(value):
            return name, value
    return None, None


opaque_functions(globals())
