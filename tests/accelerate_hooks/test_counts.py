"""Counters that add up where visits are repeated, aborted, shared or left out in part."""

from dataclasses import dataclass, field
from typing import ClassVar

import contract
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from tiny_models import TINY

from accelerate_hooks import (
    DraftAttention,
    Effect,
    ExpertSkip,
    LazyStep,
    Policy,
    SpecError,
    enable,
)  # fmt: skip
from accelerate_hooks.audit import worst
from accelerate_hooks.demo.pipeline import load_digits_pipeline, seeded_latents
from accelerate_hooks.flops import FlopMode


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


def flux_ids(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3).float()


def test_a_layout_is_that_of_each_forward_whatever_its_tensors_are_called():
    """Ids made anew for each forward take the places of freed ones in memory."""
    model, inputs = TINY["flux"].build(), TINY["flux"].inputs(1)
    tokens = inputs["hidden_states"].shape[1]
    grids = [(4, tokens // 4), (tokens // 4, 4)] * 4
    times, look = torch.linspace(1, 0.1, 8), Act()
    with torch.no_grad(), enable(model, look, only="transformer_blocks.*"):
        for t, (height, width) in zip(times, grids, strict=True):
            model(**inputs | {"img_ids": flux_ids(height, width), "timestep": t[None]})
    assert [layout.grid[1:] for layout in look.layouts[-8:]] == grids


@pytest.mark.parametrize("name", ["flux", "wan", "llama", "qwen3_moe"])
@pytest.mark.parametrize("policy", [DraftAttention(pool=(2, 2)), ExpertSkip(ratio=0.8)], ids=str)
def test_inference_mode_is_like_no_grad(name, policy):
    if (policy.name == "expert_skip") != (name == "qwen3_moe"):
        pytest.skip("no such sites")
    policy = DraftAttention(pool=(4,)) if name == "llama" else policy
    outputs = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model, inputs = TINY[name].build(), TINY[name].inputs(2)
            with enable(model, policy):
                out = model(**inputs)
                outputs.append((out if isinstance(out, tuple) else tuple(out.values()))[0].clone())
    assert torch.equal(*outputs)


def test_half_the_rows_by_one_and_the_rest_by_another_are_one_visit():
    @dataclass(frozen=True, kw_only=True)
    class Half(Policy):
        name: ClassVar[str] = "half"
        kinds = ("block",)
        whole: bool = False

        def around(self, call):
            if call.step.index == 0:
                return call.proceed()
            return call.skip() if self.whole else call.proceed(rows=[True, False])

    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(2)
    told = []
    for policies in ([Half()], [Half(), Half(whole=True)]):
        with torch.no_grad(), enable(model, policies) as session, session.run(4):
            for t in (4, 3, 2, 1):
                model(**inputs | {"timestep": torch.full_like(inputs["timestep"], t)})
        report = session.report().to_dict()
        totals = report["totals"]
        assert all(line["visits"] == 4 and line["computed"] == 1 for line in report["sites"])
        told.append((totals["skipped"], totals["partly"], totals["flops_saved"]))
    (none, half, saved), (whole, part, more) = told
    assert none == part == 0 and half == whole and more == 2 * saved


class Fast(torch.nn.Module):
    """A denoiser with PyTorch's own attention."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3)
        )

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_counting_turns_no_fast_path_off():
    torch.manual_seed(0)
    model = Fast().eval()
    x, t = torch.randn(2, 5, 16), torch.ones(2)
    with torch.no_grad():
        plain = model(x, t)
        with enable(model, LazyStep.exact()):
            assert torch.equal(model(x, t), plain)


def test_the_worst_of_errors_with_a_nan_is_nan():
    assert worst(0.1, float("nan"), 0.5) != worst(0.1, float("nan"), 0.5)
    assert worst(0.1, 0.5) == 0.5


@pytest.mark.parametrize("scope", ["model", "stack", "site"])
def test_a_step_is_computed_once_and_a_skipped_one_not_at_all(scope):
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(2)
    calls = []
    for block in model.transformer_blocks:
        block.ff.net[2].register_forward_hook(lambda *_: calls.append(1))
    policy = LazyStep(scope=scope, criterion="cadence", every=2, warmup=2, cooldown=0)
    with torch.no_grad(), enable(model, policy) as session, session.run(12):
        per_step = []
        for t in range(12, 0, -1):
            calls.clear()
            model(**inputs | {"timestep": torch.full_like(inputs["timestep"], t)})
            per_step.append(len(calls))
    depth = len(model.transformer_blocks)
    least = {"model": 0, "stack": 1, "site": 0}[scope]
    again = depth if scope == "stack" else 0  # a watched forward
    assert per_step[0] == depth + again
    assert per_step[1:] == [depth if i == 1 or i % 2 else least for i in range(1, 12)]


@pytest.mark.parametrize("scope", ["model", "stack", "site"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_what_is_saved_is_what_was_not_done(name, scope):
    """In the first generation of a session too, in which a forward may be made beside to learn."""
    model, inputs = TINY[name].build(), TINY[name].inputs(1)

    def generate():
        with torch.no_grad(), FlopMode() as counter:
            for t in range(8, 0, -1):
                model(**inputs | {"timestep": torch.full_like(inputs["timestep"], t)})
        return counter.total

    policy = LazyStep(scope=scope, criterion="cadence", every=2, warmup=2, cooldown=0)
    plain = generate()
    with enable(model, policy) as session:
        with session.run(8):
            done = generate()
        data = session.report().to_dict()
    assert data["totals"]["looks"] == (scope == "stack")
    assert (plain - done) == pytest.approx(data["totals"]["flops_saved"], rel=0.02)
    assert data["equal_cost"]["equal_steps"] == pytest.approx(8 * done / plain, rel=0.02)


def test_a_block_that_is_never_visited_costs_nothing():
    model, inputs = TINY["sd3"].build(), TINY["sd3"].inputs(2)
    calls = []
    model.transformer_blocks[0].ff.net[2].register_forward_hook(lambda *_: calls.append(1))
    policy = LazyStep(scope="stack", criterion="cadence", every=2, warmup=2, cooldown=0)
    with torch.no_grad(), enable(model, policy) as session, session.run(12):
        for t in range(12, 0, -1):
            given = inputs | {"timestep": torch.full_like(inputs["timestep"], t)}
            model(**given, skip_layers=[1])
    assert len(calls) <= 12 + 2  # the first block decides at every step


class Late:
    """A scheduler whose timesteps are not set yet."""

    timesteps = None

    def set_timesteps(self, count):
        self.timesteps = torch.linspace(1, 0, count)

    def step(self, out, timestep, sample):
        return sample - out


def test_a_scheduler_that_is_not_set_yet_is_waited_for():
    pipe = Turns(TINY["wan"].build(), TINY["wan"].build(), FlowMatchEulerDiscreteScheduler())
    with torch.no_grad(), enable(pipe, LazyStep()):
        pipe.scheduler = Late()
        pipe.transformer(**TINY["wan"].inputs(1))


class Turns(DiffusionPipeline):
    """Two models that take turns, each with two branches."""

    def __init__(self, transformer, transformer_2, scheduler):
        super().__init__()
        self.register_modules(
            transformer=transformer, transformer_2=transformer_2, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(self, inputs, other):
        self.scheduler.set_timesteps(12)
        x = inputs["hidden_states"]
        for i, t in enumerate(self.scheduler.timesteps):
            model = self.transformer_2 if i % 2 else self.transformer
            given = inputs | {"hidden_states": x, "timestep": t.expand(len(x))}
            on, off = (model(**given | {"encoder_hidden_states": c})[0] for c in (
                inputs["encoder_hidden_states"], other,
            ))  # fmt: skip
            x = self.scheduler.step(off + 2 * (on - off), t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("scope", ["model", "stack"])
def test_a_model_under_two_names_is_one_model(scope):
    """Wan's pipelines name two transformers, which may be the same."""
    inputs = TINY["wan"].inputs(1)
    other = inputs["encoder_hidden_states"].flip(1)
    policy = LazyStep(scope=scope, criterion="cadence", every=3, warmup=1, cooldown=1)
    model = TINY["wan"].build()
    calls = []
    handle = model.blocks[1].attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    pipe = Turns(model, model, FlowMatchEulerDiscreteScheduler())
    with enable(pipe, policy) as session:
        pipe(inputs, other)
        site = next(s for s in session.sites if s.path == ("" if scope == "model" else "blocks.1"))
        watched = scope == "stack"  # the first forward is seen once more
        assert len(calls) - watched == session.record(site).computed < 24
        assert len(session.roots) == 1 and session.skips
        assert "transformer_2 is the model that transformer is" in str(session.report())
    handle.remove()


@pytest.mark.parametrize("seed", range(3))
def test_a_second_model_of_a_run_takes_nothing_from_the_first(seed):
    """What is found out about the second in its first forward must not make the first run another
    than those after it."""
    inputs = TINY["wan"].inputs(1)
    text = inputs["encoder_hidden_states"]
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(seed))
    policy = LazyStep(scope="stack", criterion="change", warmup=1, cooldown=1, threshold=0.5)
    second = TINY["wan"].build()
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.05)
    pipe = Turns(TINY["wan"].build(), second, FlowMatchEulerDiscreteScheduler())
    with enable(pipe, policy) as session:
        outputs = [pipe(inputs, other) for _ in range(2)]
        assert any(session.skips.values())
    assert torch.equal(*outputs)


def test_a_forward_that_is_begun_again_was_a_whole_one():
    """What others keep of a forward, here the first block's residual, needs one to its end."""
    model, given = TINY["flux"].build(), TINY["flux"].inputs(2)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with model.cache_context("cond"):
        plain = contract.outputs(model, given)
    model.disable_cache()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    ends: list[int] = []
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[-1]):
        block.register_forward_pre_hook(lambda *_: ends.append(0))
    with enable(model, LazyStep(scope="stack", max_age=0)), model.cache_context("cond"):
        for got, want in zip(contract.outputs(model, given), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(ends) == 2 * (contract.STEPS + 1), "the first forward is seen once more"
