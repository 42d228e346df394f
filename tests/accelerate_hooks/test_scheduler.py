"""Runs that a pipeline's scheduler tells."""

import asyncio
import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import accelerate_hooks as ah
from accelerate_hooks.demo.pipeline import random_digits_pipeline, seeded_latents
from accelerate_hooks.policies import LazyStep

CADENCE = LazyStep(criterion="cadence", every=2, max_age=4, warmup=1, cooldown=1)


@pytest.fixture
def pipe():
    pipe = random_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, seed=0, labels=(1, 2), steps=8, **kwargs):
    seeds = [seed * 10 + i for i in range(len(labels))]
    with torch.no_grad():
        return pipe(
            torch.tensor(labels), num_inference_steps=steps, latents=seeded_latents(seeds), **kwargs
        ).images


def entries(session):
    return [(e.step, e.branch, e.action) for e in session.trace if e.action != "note"]


def test_steps_branches_and_the_end_of_a_run(pipe):
    with ah.enable(pipe, CADENCE) as session:
        generate(pipe)
        seen = entries(session)
        assert [step for step, _, _ in seen] == [i for i in range(8) for _ in (0, 1)]
        assert {branch for _, branch, _ in seen} == {"transformer cond", "transformer uncond"}
        skipped = [step for step, branch, action in seen if action == "skip" and "un" in branch]
        assert skipped == [2, 4, 6]
        assert session.report().to_dict()["runs"]["signals"] == {"scheduler": 1}
        assert not any(run.slots for root in session.roots for run in root.recogniser.runs())


def test_generations_do_not_see_each_other(pipe):
    def alone(**kwargs):
        with ah.enable(pipe, CADENCE):
            return generate(pipe, **kwargs)

    calls = [
        {"seed": 1},
        {"seed": 2, "labels": (3, 4, 5)},
        {"seed": 3, "steps": 5},
        {"seed": 4, "guidance_scale": 1.0},
        {"seed": 1},
    ]
    wanted = [alone(**call) for call in calls]
    with ah.enable(pipe, CADENCE):
        for call, image in zip(calls, wanted, strict=True):
            assert torch.equal(generate(pipe, **call), image)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_an_aborted_pipeline_leaves_nothing_behind(pipe, stop):
    def abort(pipe, step, time, kwargs):
        if step == stop:
            raise KeyboardInterrupt
        return kwargs

    with ah.enable(pipe, CADENCE):
        clean = generate(pipe, 1)
    with ah.enable(pipe, CADENCE) as session:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, 7, callback_on_step_end=abort)
        assert torch.equal(generate(pipe, 1), clean)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, 7, callback_on_step_end=abort)
        bare_loop_is_clean(pipe, session)


def bare_loop_is_clean(pipe, session):
    """A loop of the user's own after an abort, without the scheduler."""
    model = pipe.transformer
    from accelerate_hooks.demo.pipeline import position_ids

    context, pooled = pipe.class_embedder(torch.tensor([1, 2]))
    image_ids, text_ids = position_ids(context.shape[1], torch.device("cpu"))

    def step(time):
        with torch.no_grad():
            return model(
                hidden_states=seeded_latents([0, 1]),
                timestep=torch.full((2,), time),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]

    with session.paused():
        plain = step(0.99)
    assert torch.equal(step(0.99), plain)


def test_a_solver_that_evaluates_twice(pipe):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with ah.enable(pipe, CADENCE) as session:
        pipe.scheduler.set_timesteps(4)
        model_calls = []
        with torch.no_grad():
            context, pooled = pipe.class_embedder(torch.tensor([1, 2]))
            from accelerate_hooks.demo.pipeline import position_ids

            image_ids, text_ids = position_ids(context.shape[1], torch.device("cpu"))
            x = seeded_latents([0, 1])
            for time in pipe.scheduler.timesteps:
                out = pipe.transformer(
                    hidden_states=x,
                    timestep=time.expand(2) / 1000,
                    encoder_hidden_states=context,
                    pooled_projections=pooled,
                    img_ids=image_ids,
                    txt_ids=text_ids,
                    return_dict=False,
                )[0]
                x = pipe.scheduler.step(out, time, x, return_dict=False)[0]
                model_calls.append(float(time))
        assert [step for step, _, _ in entries(session)] == list(range(len(model_calls)))


def test_image_to_image_enters_the_schedule_late(pipe):
    with ah.enable(pipe, CADENCE) as session:
        pipe.scheduler.set_timesteps(10)
        pipe.scheduler.set_begin_index(6)
        schedule = session.schedules.current.get()
        assert schedule.left() == 4
        sigmas = pipe.scheduler.sigmas
        assert schedule.level(None) == pytest.approx((1 - float(sigmas[6]), float(sigmas[6])))


@pytest.mark.parametrize("scope", ["model", "stack", "site"])
def test_a_run_does_not_depend_on_the_runs_before_it(pipe, scope):
    policy = LazyStep(scope=scope, criterion="cadence", every=3, warmup=2, cooldown=1)
    with ah.enable(pipe, policy) as session:
        first = generate(pipe, steps=10)
        one = len([e for e in session.trace if e.action == "skip"])
        assert torch.equal(generate(pipe, steps=10), first)
        assert len([e for e in session.trace if e.action == "skip"]) == 2 * one > 0


def test_a_scheduler_given_later_is_followed(pipe):
    before = pipe.scheduler
    other = FlowMatchEulerDiscreteScheduler(shift=3.0)
    policy = LazyStep(criterion="cadence", every=4, cooldown=3)
    with ah.enable(pipe, policy) as session:
        pipe.scheduler = other
        for _ in range(2):
            got = generate(pipe, steps=12)
        assert set(session.tally.signals()) == {"scheduler"}
        assert max(e.step for e in session.trace if e.action == "skip") == 8
        pipe.scheduler = before
        generate(pipe, steps=12)
        pipe.scheduler = other
    assert not {"set_timesteps", "step"} & (vars(other).keys() | vars(before).keys())
    with ah.enable(pipe, policy):
        assert torch.equal(generate(pipe, steps=12), got)


def test_threads_and_tasks_keep_apart(pipe):
    def twin():
        """A pipeline of its own around the same transformer, as servers do."""
        made = type(pipe)(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler()})
        made.set_progress_bar_config(disable=True)
        return made

    wanted = []
    for seed in range(3):
        with ah.enable(pipe.transformer, CADENCE):
            wanted.append(generate(twin(), seed))
    found = {}

    def work(seed):
        found[seed] = generate(twin(), seed)

    with ah.enable(pipe.transformer, CADENCE):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[seed], wanted[seed]) for seed in range(3))

        async def task(seed):
            await asyncio.sleep(0)
            return await asyncio.to_thread(generate, twin(), seed)

        async def gather():
            return await asyncio.gather(*(task(seed) for seed in range(3)))

        results = asyncio.run(gather())
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


def test_the_scheduler_is_left_as_it_was(pipe):
    before = dict(vars(pipe.scheduler))
    ah.enable(pipe, CADENCE).disable()
    after = vars(pipe.scheduler)
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
