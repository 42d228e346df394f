"""What a user could take instead of ours: fewer steps, a better solver, diffusers, cache-dit.

A contestant is a name, a scheduler, a list of settings and a function `(pipe, setting)` that
changes the pipeline for the time of a `with` block, as the contestant's own documentation does.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from accelerate_hooks.demo.pipeline import SCHEDULER_CONFIG, DigitsPipeline

Setting = dict[str, Any]
Enable = Callable[[DigitsPipeline, Setting], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contestant:
    """One line of the plots.

    name: key in files; label: name in plots and tables.
    scheduler: `"euler"` (the pipeline's own) or `"dpm"` (diffusers' second-order multistep).
    settings: at most 12. `"steps"` in one of them overrides the number of scheduler steps.
    enable: makes the pipeline do less for the time of a `with` block.
    ours: its results also depend on our sources.
    """

    name: str
    label: str
    settings: tuple[Setting, ...]
    enable: Enable
    scheduler: Literal["euler", "dpm"] = "euler"
    ours: bool = False


def spell(setting: Setting) -> str:
    """A setting on one line."""
    return ", ".join(f"{key}={value}" for key, value in setting.items()) or "defaults"


def set_scheduler(pipe: DigitsPipeline, name: str) -> None:
    """The pipeline's own Euler steps, or DPM-Solver++(2M) on the same flow-matching path."""
    if name == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG)
    else:
        pipe.scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=SCHEDULER_CONFIG["num_train_timesteps"],
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            flow_shift=SCHEDULER_CONFIG["shift"],
        )


# -- the contestants ---------------------------------------------------------------------------


@contextmanager
def fewer_steps(pipe: DigitsPipeline, setting: Setting) -> Iterator[None]:
    """The plain model; `setting["steps"]` is all there is."""
    yield


@contextmanager
def _diffusers_cache(pipe: DigitsPipeline, config: Any) -> Iterator[None]:
    """`enable_cache` reads the branch from `cache_context`; the pipeline's
    `maybe_free_model_hooks` resets the state after each call."""
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def first_block_cache(pipe: DigitsPipeline, setting: Setting) -> AbstractContextManager[None]:
    """diffusers: reuse the residual of all blocks behind the first while its own changes little."""
    return _diffusers_cache(pipe, FirstBlockCacheConfig(**setting))


def taylorseer(pipe: DigitsPipeline, setting: Setting) -> AbstractContextManager[None]:
    """diffusers: every n-th step computed, features between extrapolated in the step number.

    fp32 factors as in its docstring's example; `use_lite_mode` leaves all blocks out and predicts
    the output of `proj_out`, without it the attention modules alone are predicted.
    """
    config = TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **setting)
    return _diffusers_cache(pipe, config)


def mag_cache(ratios: Callable[[], list[float]], steps: int) -> Enable:
    """diffusers: reuse the residual while the calibrated magnitude ratios say it changes little."""

    def enable(pipe: DigitsPipeline, setting: Setting) -> AbstractContextManager[None]:
        config = MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios(), **setting)
        return _diffusers_cache(pipe, config)

    return enable


def calibrate_mag_cache(pipe: DigitsPipeline, steps: int, run: Callable[[], Any]) -> list[float]:
    """MagCache's own calibration mode: the ratios it prints at the end of `run()`.

    It prints one list a branch and its configuration takes one list: the first, the conditional
    branch's, is what a user would copy.
    """
    printed = io.StringIO()
    config = MagCacheConfig(num_inference_steps=steps, calibrate=True)
    with _diffusers_cache(pipe, config), contextlib.redirect_stdout(printed):
        run()
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    return [float(ratio) for ratio in ast.literal_eval(lists[0])]


def db_cache(steps: int) -> Enable:
    """cache-dit: DBCache, with the TaylorSeer calibrator where the setting has an `order`.

    The adapter is the one cache-dit registers for Flux pipelines (all blocks as one list); the
    pipeline makes two calls a step, so the CFG is separate. Its wrapper around the pipeline's
    `__call__` refreshes the context before each run.
    """

    @contextmanager
    def enable(pipe: DigitsPipeline, setting: Setting) -> Iterator[None]:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
        import cache_dit
        from cache_dit.caching.patch_functors import FluxPatchFunctor

        transformer = pipe.transformer
        adapter = cache_dit.BlockAdapter(
            pipe=pipe,
            transformer=transformer,
            blocks=transformer.transformer_blocks + transformer.single_transformer_blocks,
            blocks_name="transformer_blocks",
            dummy_blocks_names=["single_transformer_blocks"],
            patch_functor=FluxPatchFunctor(),
            forward_pattern=cache_dit.ForwardPattern.Pattern_1,
            has_separate_cfg=True,
        )
        options = dict(setting)
        order = options.pop("order", None)
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        config = cache_dit.DBCacheConfig(
            enable_separate_cfg=True, num_inference_steps=steps, **options
        )
        adapter = cache_dit.enable_cache(adapter, config, calibrator)
        try:
            yield
        finally:
            cache_dit.disable_cache(adapter)

    return enable


def _lite(interval: int, order: int, **more: Any) -> Setting:
    return {"use_lite_mode": True, "cache_interval": interval, "max_order": order, **more}


def _mag(threshold: float, most: int, retention: float) -> Setting:
    return {"threshold": threshold, "max_skip_steps": most, "retention_ratio": retention}


def _db(warmup: int, continuous: int, threshold: float, **more: Any) -> Setting:
    """DBCache with one block computed ahead of the decision: the model has but six."""
    return {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": warmup,
        "max_continuous_cached_steps": continuous,
        "residual_diff_threshold": threshold,
        **more,
    }


def contestants(steps: int, ratios: Callable[[], list[float]]) -> tuple[Contestant, ...]:
    """All but ours, for runs of `steps` steps; `ratios` gives MagCache's calibration."""
    fractions = (0.8, 0.72, 0.66, 0.6, 0.5, 0.44, 0.4, 0.34, 0.32, 0.26, 0.2, 0.16)
    fewer = tuple({"steps": round(fraction * steps)} for fraction in fractions)
    thresholds = (0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.12, 0.16, 0.2, 0.3, 0.4)
    taylor = (
        {"cache_interval": 2, "max_order": 1},
        _lite(2, 1, disable_cache_before_step=16),
        *(_lite(2, 1, disable_cache_after_step=last) for last in (35, 48)),
        *(_lite(n, 1, disable_cache_after_step=48) for n in (3, 4)),
        *(_lite(n, 1) for n in (2, 3, 4, 5)),
        _lite(3, 1, disable_cache_before_step=12, disable_cache_after_step=48),
        _lite(3, 1, disable_cache_after_step=40),
    )
    mag = (
        *(_mag(0.02, 1, 0.2), _mag(0.06, 1, 0.2), _mag(0.06, 2, 0.2), _mag(0.12, 2, 0.2)),
        *(_mag(0.12, 3, 0.2), _mag(0.06, 3, 0.1), _mag(0.12, 3, 0.1), _mag(0.12, 4, 0.1)),
        *(_mag(0.24, 3, 0.1), _mag(0.24, 5, 0.1), _mag(0.5, 6, 0.1), _mag(0.02, 1, 0.1)),
    )
    db = (
        *(_db(8, 1, 0.08), _db(4, 1, 0.08), _db(4, 1, 0.24), _db(4, -1, 0.05)),
        *(_db(4, -1, 0.08), _db(4, -1, 0.1), _db(4, 2, 0.12), _db(4, 3, 0.12)),
        *(_db(4, 4, 0.12), _db(4, 4, 0.24), _db(4, -1, 0.2), _db(4, -1, 0.4)),
    )
    db_taylor = (
        *(_db(8, 1, 0.08, order=1), _db(8, 1, 0.12, order=2), _db(4, 1, 0.12, order=2)),
        *(_db(4, 2, 0.12, order=2), _db(4, 2, 0.24, order=2), _db(4, 3, 0.16, order=2)),
        *(_db(4, 3, 0.24, order=2), _db(4, 4, 0.24, order=2), _db(4, 6, 0.4, order=2)),
        *(_db(4, 10, 0.8, order=2), _db(2, 1, 0.12, order=2), _db(8, 3, 0.16, order=2)),
    )
    first_block = tuple({"threshold": threshold} for threshold in thresholds)
    both = db_cache(steps)
    return (
        Contestant("steps", "fewer steps (Euler)", fewer, fewer_steps),
        Contestant("solver", "fewer steps (DPM-Solver++ 2M)", fewer, fewer_steps, "dpm"),
        Contestant(
            "first_block_cache", "FirstBlockCache (diffusers)", first_block, first_block_cache
        ),
        Contestant("taylorseer", "TaylorSeer (diffusers)", taylor, taylorseer),
        Contestant("mag_cache", "MagCache (diffusers)", mag, mag_cache(ratios, steps)),
        Contestant("db_cache", "DBCache (cache-dit)", db, both),
        Contestant("db_cache_taylorseer", "DBCache + TaylorSeer (cache-dit)", db_taylor, both),
    )


# -- facts that no contestant reports itself ---------------------------------------------------


class Flops(FlopCounterMode):
    """torch's own counter of matrix products, with the CPU's attention kernel that it lacks."""

    def __init__(self) -> None:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        count = {kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
        super().__init__(display=False, custom_mapping=count)


@contextmanager
def linear_calls(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts how often linear layers really run, by plain pre-hooks on the leaves."""
    calls: Counter[str] = Counter()

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls["linear"] += 1

    leaves = (module for module in model.modules() if isinstance(module, nn.Linear))
    handles = [leaf.register_forward_pre_hook(count) for leaf in leaves]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def attributes(pipe: DigitsPipeline) -> Counter[str]:
    """How many objects of a pipeline carry each instance attribute, classes included."""
    found = Counter(f"{type(pipe).__name__}.{name}" for name in vars(type(pipe)))
    for module in pipe.transformer.modules():
        found.update(f"{type(module).__name__}.{name}" for name in vars(module))
    return found
