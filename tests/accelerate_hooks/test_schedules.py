"""Where a generation stands, with pipelines that enter a schedule late, leave it early, copy or
share their scheduler, or are given other models."""

import contextlib
import copy
import gc
import itertools
import math
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY
from torch import nn

import accelerate_hooks as ah
from accelerate_hooks.history import relative_error
from accelerate_hooks.patches.diffusers import DiffusersPatch
from accelerate_hooks.policies import LazyStep
from accelerate_hooks.run import Run
from accelerate_hooks.schedule import Schedule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The configuration file of the unet:FutureWarning",
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
)
WIDTH = 24
PLAIN = {"steps_offset": 1, "clip_sample": False}
CADENCE = LazyStep(criterion="cadence", every=3, warmup=2, cooldown=2, predictor="hold")


@dataclass(frozen=True, kw_only=True)
class Look(ah.Policy):
    """Sees every forward and does nothing."""

    name: ClassVar[str] = "look"
    kinds = ("model",)

    def acts(self, site):
        return frozenset({ah.Effect.OBSERVE})

    def around(self, call):
        SEEN.append(call.step)
        return call.proceed()


class Loop(SimpleNamespace):
    """Looks like a pipeline."""


SEEN = []


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()


def unet(**kwargs):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, **kwargs,
    ).eval()  # fmt: skip


def pipeline(kind, scheduler, **unet_settings):
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4).eval()
    parts = {"vae": vae, "unet": unet(**unet_settings), "scheduler": scheduler}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"))
    if kind is StableDiffusionXLPipeline:
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps=20, **kwargs):
    draw = torch.Generator().manual_seed(0)
    prompts = {
        name: torch.randn(1, 5, WIDTH, generator=draw)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    given = prompts | {"num_inference_steps": steps, "generator": draw, "output_type": "latent"}
    return pipe(**given | kwargs).images


def image_to_image(pipe, steps=20, strength=0.4):
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return generate(pipe, steps, image=image, strength=strength)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**PLAIN),
        DDPMScheduler(**PLAIN),
        PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        EulerDiscreteScheduler(steps_offset=1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_image_to_image_is_told_its_own_steps(scheduler):
    pipe = pipeline(StableDiffusionImg2ImgPipeline, scheduler)
    with ah.enable(pipe, Look()) as session:
        image_to_image(pipe)
        first, *_ = SEEN
        steps = len(SEEN)
        assert [(s.index, s.total) for s in SEEN] == [(i, steps) for i in range(steps)]
        product = float(pipe.scheduler.alphas_cumprod[round(first.time)])
        assert first.noise == pytest.approx((product**0.5, (1 - product) ** 0.5), abs=2e-3)
        assert session.schedules.current.get().run.ended


def test_the_last_steps_of_image_to_image_are_computed():
    pipe = pipeline(StableDiffusionImg2ImgPipeline, DDIMScheduler(**PLAIN))
    with ah.enable(pipe, CADENCE) as session:
        image_to_image(pipe, steps=30, strength=0.6)
        done = [visit["action"] for visit in session.report().steps]
        assert len(done) == 18 and "skipped" in done[:16]
        assert done[16:] == ["computed", "computed"]
        assert session.report().to_dict()["caches"]["bytes_now"] == 0


def sdxl(pipe, end):
    pooled = torch.zeros(1, 8)
    return generate(
        pipe, 10, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=pooled,
        denoising_end=end, height=8, width=8,
    )  # fmt: skip


def test_a_generation_that_leaves_the_schedule_early():
    pipe = pipeline(
        StableDiffusionXLPipeline,
        DDIMScheduler(**PLAIN),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    with ah.enable(pipe, Look()) as session:
        for end, steps in ((0.6, 6), (0.6, 6), (None, 10)):
            SEEN.clear()
            sdxl(pipe, end)
            assert [(s.index, s.total) for s in SEEN] == [(i, steps) for i in range(steps)]
            assert session.schedules.current.get().run.ended
        sdxl(pipe, 0.6)
        SEEN.clear()
        by_hand(pipe, 10)  # the pipeline's count is of its own last call
        assert {s.total for s in SEEN} == {10}


def by_hand(pipe, steps, start=0, given=lambda t: t, stepped=lambda t: t):
    """A loop of the user's own around a pipeline's parts."""
    added = {"text_embeds": torch.zeros(1, 8), "time_ids": torch.zeros(1, 6)}
    x, prompt = torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, WIDTH)
    pipe.scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[start:]:
            out = pipe.unet(x, given(t), prompt, added_cond_kwargs=added).sample
            x = pipe.scheduler.step(out, stepped(t), x).prev_sample


@pytest.mark.parametrize("given", [lambda t: t, lambda t: t.clone(), float])
@pytest.mark.parametrize(
    ("scheduler", "stepped"),
    [
        (DDIMScheduler(**PLAIN), lambda t: t),
        (DDIMScheduler(**PLAIN), int),
        (EulerDiscreteScheduler(steps_offset=1), lambda t: t),
    ],
)
def test_a_late_start_that_nobody_told(scheduler, given, stepped):
    """What the model is given shows it, at the latest what the scheduler is."""
    pipe = pipeline(StableDiffusionPipeline, scheduler)
    with ah.enable(pipe, Look()):
        by_hand(pipe, 20, 12, given, stepped)
    assert len(SEEN) == 8
    for step in SEEN[1:]:
        product = float(pipe.scheduler.alphas_cumprod[round(step.time)])
        assert step.total == 8
        assert step.noise == pytest.approx((product**0.5, (1 - product) ** 0.5), abs=2e-3)
    assert [s.index for s in SEEN] == list(range(8))


@pytest.mark.parametrize("times", ["tail", "without the last", "whole"])
def test_a_bare_view_does_not_tell_how_many_steps_there_are(times):
    """A view shows where it stands in its storage, not which part of it the loop goes through."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    whole = scheduler.timesteps
    views = {"tail": whole[10:], "without the last": torch.linspace(1, 0, 21)[:-1], "whole": whole}
    model, given = TINY["flux"].build(), TINY["flux"].inputs(1)
    with torch.no_grad(), ah.enable(model, Look()) as session:
        for t in views[times]:
            model(**given | {"timestep": t[None]})
        assert [s.index for s in SEEN] == list(range(len(views[times])))
        assert {s.total for s in SEEN} == {None} and session.tally.runs == 1


# -- copies of a scheduler ----------------------------------------------------------------------


@pytest.mark.parametrize("by", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copied_scheduler_is_its_own(by):
    pipe = pipeline(StableDiffusionPipeline, DDIMScheduler(**PLAIN))
    original, kind = pipe.scheduler, type(pipe.scheduler)
    before = dict(vars(original))
    with ah.enable(pipe, Look()) as session:
        assert isinstance(original, kind) and type(original).__name__ == kind.__name__
        assert vars(original) == before
        original.set_timesteps(8)
        run = session.schedules.current.get().run
        other = by(original)
        other.set_timesteps(5)
        assert (len(original.timesteps), len(other.timesteps)) == (8, 5)
        assert type(other) is kind and vars(other).keys() == vars(original).keys()
        assert session.schedules.current.get().run is run
        assert type(type(original).from_config(original.config)) is kind
    assert type(original) is kind


def test_an_own_method_of_a_scheduler_is_heard_and_left():
    pipe = pipeline(StableDiffusionPipeline, DDIMScheduler(**PLAIN))
    pipe.scheduler.step = mine = pipe.scheduler.step
    with ah.enable(pipe, Look()):
        generate(pipe, 6)
    assert [(s.index, s.total) for s in SEEN] == [(i, 6) for i in range(6)]
    assert pipe.scheduler.step is mine and type(pipe.scheduler) is DDIMScheduler


def test_a_panorama(monkeypatch):
    """It puts copies of its scheduler's ``__dict__`` back into it, once for each window; windows
    that do not overlap are generations of their own."""
    pipe = pipeline(StableDiffusionPanoramaPipeline, DDIMScheduler(**PLAIN))
    latents = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(2))
    windows = [(0, 8, 0, 8), (0, 8, 8, 16)]

    def panorama(count, latents):
        monkeypatch.setattr(pipe, "get_views", lambda *_, **__: windows[:count])
        return generate(pipe, 12, latents=latents, height=8, width=latents.shape[-1])

    plain, before = panorama(2, latents), vars(pipe.scheduler).keys()
    with ah.enable(pipe, LazyStep.exact()):
        assert torch.equal(panorama(2, latents), plain)
    with ah.enable(pipe, CADENCE) as session:
        got = panorama(2, latents)
        assert session.report().to_dict()["totals"]["skipped"] > 0
        for part in (slice(0, 8), slice(8, 16)):
            assert torch.equal(panorama(1, latents[..., part].clone()), got[..., part])
    assert not torch.equal(got, plain)
    assert vars(pipe.scheduler).keys() == before and type(pipe.scheduler) is DDIMScheduler
    assert torch.equal(panorama(2, latents), plain)


def test_a_scheduler_for_each_request_leaves_nothing():
    pipe = pipeline(StableDiffusionPipeline, DDIMScheduler(**PLAIN))

    def request():
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        generate(pipe, 8)
        gc.collect()
        return len(session.ledger._undo), len(EulerDiscreteScheduler.__subclasses__())

    with ah.enable(pipe, CADENCE) as session:
        assert request() == request() == request()
        assert session.tally.signals() == {"scheduler": 3}
    assert type(pipe.scheduler) is EulerDiscreteScheduler


class Proxy:
    """Delegates to a scheduler."""

    def __init__(self, inner):
        self.__dict__["inner"] = inner

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Unhashable(DDIMScheduler):
    def __eq__(self, other):
        return self is other


class Final(DDIMScheduler):
    def __init_subclass__(cls):
        raise ValueError("final")


@pytest.mark.parametrize("kind", [Proxy, Slotted, Unhashable, Final])
def test_a_scheduler_of_an_unusual_class(kind):
    pipe = pipeline(StableDiffusionPipeline, DDIMScheduler(**PLAIN))
    plain = DDIMScheduler(**PLAIN)
    pipe.scheduler = kind(plain) if kind in (Proxy, Slotted) else kind(**PLAIN)
    wanted = generate(pipe, 8)
    with ah.enable(pipe, CADENCE) as session:
        generate(pipe, 8)
        slotted = kind is Slotted
        assert session.tally.signals() == {"timestep" if slotted else "scheduler": 1}
        assert ("Slotted cannot be heard" in str(session.report())) is slotted
        if kind is Proxy:
            run = session.schedules.current.get().run
            for by in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
                other = by(pipe.scheduler)
                other.set_timesteps(5)
                assert (len(other.timesteps), len(plain.timesteps)) == (5, 8)
            assert session.schedules.current.get().run is run
    assert type(pipe.scheduler) is kind
    assert slotted or not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()
    assert torch.equal(generate(pipe, 8), wanted)


class Reduced(DDIMScheduler):
    def __reduce__(self):
        return Reduced.from_config, (dict(self.config),)


@pytest.mark.parametrize("by", [copy.copy, copy.deepcopy])
def test_a_scheduler_that_says_how_it_is_copied(by):
    pipe = pipeline(StableDiffusionPipeline, Reduced(**PLAIN))
    with ah.enable(pipe, Look()):
        other = by(pipe.scheduler)
    assert type(other) is Reduced and other.config == pipe.scheduler.config


# -- several pipelines, other models --------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_pipelines_that_share_a_scheduler(order):
    scheduler = DDIMScheduler(**PLAIN)
    pipes = [pipeline(StableDiffusionPipeline, scheduler) for _ in range(2)]
    before = dict(vars(scheduler))
    sessions = [ah.enable(pipe, CADENCE) for pipe in pipes]
    images = [generate(pipe, 9) for pipe in pipes]
    for session in sessions:
        assert session.tally.signals() == {"scheduler": 1}
        assert session.tally.recent[-1].total == 9
    sessions[order[0]].disable()
    generate(pipes[order[1]], 9)
    assert sessions[order[1]].tally.signals() == {"scheduler": 2}
    sessions[order[1]].disable()
    assert type(scheduler) is DDIMScheduler and vars(scheduler).keys() == before.keys()
    assert all(type(pipe) is StableDiffusionPipeline for pipe in pipes)
    with ah.enable(pipes[1], CADENCE):
        assert torch.equal(generate(pipes[1], 9), images[1])


def test_a_replaced_model_is_named():
    pipe = pipeline(StableDiffusionPipeline, DDIMScheduler(**PLAIN))
    mine = pipe.unet
    with ah.enable(pipe, CADENCE) as session:
        pipe.unet = nn.Sequential(mine)  # around it: still heard
        session.report()
        pipe.unet = unet()
        with pytest.warns(ah.InertWarning, match="unet: the pipeline was given another"):
            generate(pipe, 4)
        assert not session.forwards
        assert "unet: the pipeline was given another" in str(session.report())


@pytest.mark.parametrize("told_by", ["report", "disable"])
def test_a_replaced_block_is_named(told_by):
    model = TINY["flux"].build()
    session = ah.enable(model, LazyStep(scope="stack"))
    model.transformer_blocks[1] = copy.deepcopy(model.transformer_blocks[1])
    with pytest.warns(ah.InertWarning, match=r"transformer_blocks\.1.*: replaced since enable"):
        getattr(session, told_by)()
    assert "transformer_blocks.1" in str(session.report())
    session.disable()


# -- other people's loops --------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["hold", "linear"])
def test_a_caller_may_write_to_what_it_gets(predictor):
    """`eps = model(x, t)[0]; eps *= 2` is `eps = model(x, t)[0] * 2`."""
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(1)
    policy = LazyStep(
        criterion="cadence", every=3, warmup=2, cooldown=0, predictor=predictor, corrector=False
    )
    made = []
    for inplace in (False, True):
        outputs = []
        with torch.no_grad(), ah.enable(model, policy) as session:
            for t in range(9, 0, -1):
                out = model(**inputs | {"timestep": torch.tensor([t])})[0]
                outputs.append(out.mul_(1.5) if inplace else out * 1.5)
            assert session.report().to_dict()["totals"]["skipped"] > 3
        made.append(outputs)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("declared", [False, True])
def test_a_branch_that_comes_and_goes_under_the_same_prompt_is_doubted(declared):
    """With the picture and without: one prompt for both calls, one of them in some steps only."""
    model = unet(in_channels=8)
    with torch.no_grad():
        model.conv_in.weight[:, 4:] *= 20
    prompt, picture, none = (
        torch.randn(1, 5, WIDTH),
        torch.randn(1, 4, 8, 8),
        torch.zeros(1, 4, 8, 8),
    )

    def ask(t, what):
        return model(torch.cat([x, what], 1), t, encoder_hidden_states=prompt)[0]

    x, times = torch.randn(1, 4, 8, 8), torch.linspace(900, 50, 12)
    policy = LazyStep(criterion="cadence", every=2, warmup=1, cooldown=0)
    with torch.no_grad(), ah.enable(model, policy) as session:
        with session.run(total=12) if declared else contextlib.nullcontext():
            for i, t in enumerate(times):
                if 3 <= i < 9:
                    got = ask(t, none)
                    with session.paused():
                        wanted = ask(t, none)
                    assert i == 3 or torch.equal(got, wanted), i
                x = x - 0.05 * ask(t, picture)
        # a bare loop takes the second call of a timestep for another run
        assert not declared or "number of calls a timestep" in str(session.report())


@pytest.mark.parametrize("how", ["raise", "interrupt"])
def test_an_unfinished_pipeline_leaves_nothing_to_the_next_one(how):
    """The other one has a scheduler of its own, which is not heard, and the same prompt tensors."""
    pipe = pipeline(StableDiffusionPipeline, DDIMScheduler(**PLAIN))
    model, prompt = pipe.unet, torch.randn(2, 5, WIDTH)

    def stop(pipe, i, t, tensors):
        if i == 3 and how == "raise":
            raise KeyboardInterrupt
        pipe._interrupt = i >= 3
        return tensors

    policy = LazyStep(criterion="cadence", every=2, warmup=1, cooldown=0, corrector=False)
    with torch.no_grad(), ah.enable(pipe, policy) as session:
        with contextlib.suppress(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=stop)
        runs = [run for root in session.roots for run in root.recogniser.runs()]
        assert not any(run.slots for run in runs) and session.schedules.current.get().run.ended
        x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.25)
        got = model(x, t, encoder_hidden_states=prompt)[0]
        with session.paused():
            assert torch.equal(got, model(x, t, encoder_hidden_states=prompt)[0])


def test_a_loop_that_steps_without_its_scheduler_is_told_by_its_timesteps():
    model, inputs = TINY["flux"].build(), TINY["flux"].inputs(1)
    scheduler = FlowMatchEulerDiscreteScheduler()

    policy, kept = LazyStep(scope="site", criterion="cadence", every=2, cooldown=0), []
    pipe = Loop(transformer=model, scheduler=scheduler, components={})
    with torch.no_grad(), ah.enable(pipe, policy) as session:
        scheduler.set_timesteps(12)
        for t in scheduler.timesteps:
            model(**inputs | {"timestep": t.expand(1) / 1000})
            kept.append(session.tally.bytes_now())
        assert session.report().to_dict()["totals"]["skipped"] > 10
    assert kept[-1] == kept[5]


@pytest.mark.parametrize("broken", [False, True])
def test_a_scheduler_of_the_users_own_may_lack_what_diffusers_has(broken):
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(1)

    class Mine:
        def set_timesteps(self, count):
            self.timesteps = "soon" if broken else torch.arange(count, 0, -1)

        def step(self, out, t, x):
            return x

    pipe = Loop(transformer=model, scheduler=Mine(), components={})
    with torch.no_grad(), ah.enable(pipe, CADENCE) as session:
        pipe.scheduler.set_timesteps(6)
        if broken:
            assert "Mine does not tell its noise levels" in str(session.report())
            return
        for t in pipe.scheduler.timesteps:
            pipe.scheduler.step(model(**inputs | {"timestep": t.expand(1)}), t, None)
        assert session.report().to_dict()["runs"]["signals"] == {"scheduler": 1}


@pytest.mark.parametrize("kind", [KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler])
@pytest.mark.parametrize("steps", [7, 10, 20])
def test_levels_between_the_sigmas_are_those_that_the_model_sees(kind, steps):
    """And timesteps that go up and down are one run."""
    pipe = pipeline(StableDiffusionPipeline, kind(steps_offset=1))
    seen = []
    scale = pipe.scheduler.scale_model_input

    def scaled(x, t):
        out = scale(x, t)
        ratio = (x.norm() / out.norm()).item()
        seen.append(math.sqrt(max(ratio**2 - 1, 0)))
        return out

    pipe.scheduler.scale_model_input = scaled
    with torch.no_grad(), ah.enable(pipe, Look()) as session:
        generate(pipe, steps=steps)
        assert session.report().to_dict()["runs"]["count"] == 1
    told = [step.noise[1] / step.noise[0] for step in SEEN]
    assert told == pytest.approx(seen, rel=2e-3)


def test_the_last_stride_of_a_scheduler_that_counts_up():
    """Mochi's goes from 0 to 1."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(20)
    strides = DiffusersPatch().strides(scheduler)
    sigmas = [float(s) for s in scheduler.sigmas]
    assert strides == pytest.approx([b - a for a, b in itertools.pairwise(sigmas)])


@pytest.mark.parametrize("karras", [False, True])
def test_levels_that_differ_by_rounding_are_one_level(karras):
    """KDPM2Ancestral evaluates twice at (almost) the same level, and to and fro with Karras'
    sigmas: a predictor that divides by such distances was off by a factor of 3,000."""

    def outcome(*policy):
        pipe = pipeline(
            StableDiffusionPipeline,
            KDPM2AncestralDiscreteScheduler(use_karras_sigmas=karras, steps_offset=1),
        )
        with torch.no_grad(), contextlib.ExitStack() as stack:
            session = stack.enter_context(ah.enable(pipe, *policy)) if policy else None
            out = generate(pipe, steps=12)
            return out, session and session.report().to_dict()["totals"]["skipped"]

    wanted, _ = outcome()
    got, skipped = outcome(LazyStep(criterion="cadence", every=2))
    assert skipped and relative_error((got,), (wanted,)) < 0.2


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=12), st.booleans())
def test_levels_are_a_clock_or_none(ratios, down):
    ratios = sorted(ratios, reverse=down)
    levels = [
        (1 / math.hypot(1, math.exp(r)), math.exp(r) / math.hypot(1, math.exp(r))) for r in ratios
    ]
    schedule = Schedule(Run(signal="test"), None, None)
    schedule.learn_noise(levels)
    assert schedule.one_way and len(schedule.noise) == len(levels)
    told = [math.log(s / a) for a, s in schedule.noise]
    mean = (max(ratios) - min(ratios)) / max(1, len(ratios) - 1)
    gaps = [abs(a - b) for a, b in itertools.pairwise(told)]
    assert all(gap == 0 or gap >= 0.99e-3 * mean for gap in gaps)
    if mean > 1e-3:
        schedule.learn_noise([*levels, levels[0], *levels, levels[0]])
        assert not schedule.one_way and not schedule.noise
