"""Counters that add up where visits are repeated, aborted, shared or left out in part."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from tiny_models import TINY

from accelerate_hooks import Effect, LazyStep, Policy, SpecError, enable
from accelerate_hooks.demo.pipeline import load_digits_pipeline, seeded_latents


@dataclass(frozen=True, kw_only=True)
class Act(Policy):
    """Does what it is told at blocks, and says what it spares."""

    name: ClassVar[str] = "act"
    effect: Effect = Effect.OBSERVE
    spared: float = 0.0
    layouts: list = field(default_factory=list)
    kinds = ("block",)

    def acts(self, site):
        return frozenset({self.effect})

    def around(self, call):
        if call.site.index == 0:
            self.layouts.append(call.layout)
        return call.proceed(x=call.x, spared=self.spared) if self.spared else call.proceed()


@pytest.fixture(scope="module")
def digits():
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def run(steps, guidance=2.0):
        return pipe(
            [3], latents=seeded_latents([1]), num_inference_steps=steps, guidance_scale=guidance,
            output_type="pt",
        ).images  # fmt: skip

    return pipe, run


def test_a_forward_that_is_begun_again_counts_once(digits):
    pipe, run = digits
    with enable(pipe, LazyStep(scope="stack", criterion="cadence")) as session:
        run(12)
        report = session.report().to_dict()
    assert {line["visits"] for line in report["sites"]} == {report["totals"]["forwards"]} == {24}
    places = [(v["run"], v["step"], v["branch"], v["site"]) for v in report["steps"]]
    assert len(places) == len(set(places))


def test_an_aborted_forward_is_no_plain_cost(digits):
    pipe, run = digits
    count = []

    def stop(module, args):
        count.append(0)
        if len(count) == 2:
            raise KeyboardInterrupt

    policy = LazyStep(
        scope="site", criterion="cadence", predictor="hold", warmup=1, cooldown=0, every=2
    )
    handle = pipe.transformer.norm_out.register_forward_pre_hook(stop)
    try:
        with enable(pipe, policy) as session:
            with pytest.raises(KeyboardInterrupt):
                run(6, guidance=1.0)
            totals = session.report().to_dict()["totals"]
            assert totals["forwards"] == 2 and totals["uncounted_forwards"] == 1
            assert totals["flops_plain"] is None
    finally:
        handle.remove()


def test_blocks_left_out_together_are_not_audited(digits):
    pipe, run = digits
    with enable(pipe, LazyStep(scope="stack", criterion="cadence"), audit=1) as session:
        run(12)
        audit = session.report().to_dict()["audit"]
    assert audit["count"] == 0
    (why,) = audit["left_out"]
    assert "left out together" in why


def test_a_declared_run_around_a_pipeline_changes_nothing(digits):
    pipe, run = digits
    for settings in ({}, {"quantity": "clean"}, {"criterion": "cadence"}):
        with enable(pipe, LazyStep(**settings)) as session:
            told = run(24)
            with session.run():
                assert torch.equal(run(24), told)
            with session.run(total=24):
                assert torch.equal(run(24), told)


def test_spared_work_is_told_from_outside_another_policy():
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(1)
    outer = Act(effect=Effect.RESHAPE, spared=1e6)
    inner = Act(effect=Effect.REPLACE)
    told = []
    for policies in ([outer], [outer, inner]):
        with torch.no_grad(), enable(model, policies) as session:
            model(**inputs)
            totals = session.report().to_dict()["totals"]
        told.append((totals["partly"], totals["flops_saved"], totals["flops_plain"]))
    assert told[0] == told[1] and told[0][0] > 0


def test_who_only_looks_may_stand_anywhere():
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(1)
    replace, look = Act(effect=Effect.REPLACE), Act()
    for policies in ([replace, look], [look, replace]):
        with torch.no_grad(), enable(model, policies):
            model(**inputs)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ltx", lambda kw: {"num_frames": 1, "height": kw["num_frames"] * kw["height"]}),
        ("wan", lambda kw: {"hidden_states": kw["hidden_states"].transpose(3, 4)}),
    ],
)
def test_a_layout_follows_from_all_that_it_is_read_from(name, change):
    model, inputs = TINY[name].build(), TINY[name].inputs(1)
    inputs |= {"hidden_states": inputs["hidden_states"][..., :4]} if name == "wan" else {}
    other = inputs | change(inputs)
    look = Act()
    with torch.no_grad(), enable(model, look) as session:
        with session.run():
            model(**inputs)
            model(**other)
        model(**other)
    first, second, alone = (layout.grid for layout in look.layouts)
    assert second == alone != first


def test_an_empty_glob_is_refused():
    with pytest.raises(SpecError, match="matches no path"):
        enable(TINY["dit"].build(), Act(), only="")
