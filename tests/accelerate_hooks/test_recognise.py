"""Which run and branch a forward belongs to: the patterns of real loops, four of them limits."""

import ast
import asyncio
import contextlib
import contextvars
import gc
import threading
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import TINY

import accelerate_hooks as ah
from accelerate_hooks.policies import LazyStep

TIMES = [900, 700, 500, 300, 100]
SMALL, LARGE = (2, 4, 8, 8), (2, 4, 16, 16)


@dataclass(frozen=True, kw_only=True)
class Watch(ah.Policy):
    """Sees every forward and does nothing."""

    name: ClassVar[str] = "watch"
    kinds = ("model",)

    def acts(self, site):
        return frozenset({ah.Effect.OBSERVE})

    def around(self, call):
        SEEN.append((call.step.run.number, call.step.index, call.step.branch))
        return call.proceed()


SEEN: list[tuple[int, int, str]] = []


@pytest.fixture(scope="module")
def model():
    return TINY["dit"].build()


@pytest.fixture
def watched(model):
    SEEN.clear()
    with ah.enable(model, Watch()):
        yield model


def step(model, time, shape=SMALL, labels=None, x=None):
    labels = torch.tensor([1, 2]) if labels is None else labels
    x = torch.zeros(shape) if x is None else x
    if not isinstance(time, torch.Tensor):
        time = torch.tensor([time] * shape[0])
    with torch.no_grad():
        return model(x, time, class_labels=labels, return_dict=False)[0]


def walk(model, seed, times):
    """A small generation: all outputs."""
    x = torch.randn(SMALL, generator=torch.Generator().manual_seed(seed))
    labels, outs = torch.tensor([seed, seed + 1]), []
    for time in times:
        yield
        outs.append(step(model, time, labels=labels, x=x)[:, :4])
        x = x - 0.1 * outs[-1]
    return outs


def finish(generation):
    while True:
        try:
            next(generation)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("scope", ["model", "stack", "site"])
@pytest.mark.parametrize("way", ["tasks", "threads"])
def test_children_of_a_context_that_has_run_start_clean(model, scope, way):
    """A task or worker inherits its parent's context variables, not its run."""
    policy = LazyStep(scope=scope, criterion="cadence", every=2, warmup=2, cooldown=0)
    plans = [(1, range(900, 400, -50)), (2, range(880, 380, -50))]

    async def task(plan):
        if way == "threads":
            return await asyncio.to_thread(lambda: finish(walk(model, *plan)))
        generation = walk(model, *plan)
        while True:
            try:
                next(generation)
            except StopIteration as end:
                return end.value
            await asyncio.sleep(0)

    async def together():
        return await asyncio.gather(*map(task, plans))

    wanted = []
    for plan in plans:
        with ah.enable(model, policy):
            wanted.append(finish(walk(model, *plan)))
    with ah.enable(model, policy) as session:
        step(model, 950)
        got = asyncio.run(together())
        assert any(entry.action == "skip" for entry in session.trace)
    for a, b in zip(got, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def runs():
    return len({number for number, _, _ in SEEN})


def branches():
    return [branch for _, _, branch in SEEN]


def generate(model, times, labels, shape=SMALL):
    for time in times:
        step(model, time, shape, labels)


def two_prompts():
    return torch.tensor([1, 2]), torch.tensor([3, 4])


@pytest.mark.parametrize(
    ("first", "second", "shapes"),
    [
        (TIMES, TIMES, (SMALL, SMALL)),
        (TIMES[::-1], TIMES, (SMALL, SMALL)),  # inversion, then sampling
        (TIMES, TIMES, (SMALL, LARGE)),  # a refiner at another size
        (TIMES[3:], TIMES[3:], (SMALL, SMALL)),  # the low-noise expert sees the tail only
        (TIMES[:2], TIMES[2:], (SMALL, SMALL)),  # aborted, then image-to-image from the middle
        (TIMES[:1], TIMES, (SMALL, SMALL)),  # aborted at its first step
        ([999], [999], (SMALL, SMALL)),  # one-step generations
    ],
)
def test_two_generations_are_two_runs(watched, first, second, shapes):
    a, b = two_prompts()
    generate(watched, first, a, shapes[0])
    if len(first) == 1:
        step(watched, first[0], shapes[0], b)  # the same timestep for another prompt: a branch
        SEEN.pop()
    generate(watched, second, b, shapes[1])
    states = [(number, branch) for number, _, branch in SEEN]
    assert not set(states[: len(first)]) & set(states[len(first) :])


def test_one_generation_is_one_run(watched):
    generate(watched, TIMES, torch.tensor([1, 2]))
    assert [(index, branch) for _, index, branch in SEEN] == [(i, "branch 0") for i in range(5)]
    assert runs() == 1


@pytest.mark.parametrize("count", [2, 3])
def test_sequential_branches_are_told_by_their_conditioning(watched, count):
    given = [torch.tensor([i, i]) for i in range(count)]
    for time in TIMES:
        for labels in given:
            step(watched, time, labels=labels)
    assert runs() == 1
    assert branches() == [f"branch {i}" for i in range(count)] * len(TIMES)


def test_a_guidance_interval_drops_a_branch(watched):
    cond, uncond = two_prompts()
    prompts = []
    for time in [900, 800, 700, 600, 500, 400, 300]:
        for labels in (uncond, cond) if time in (700, 600, 500) else (cond,):
            step(watched, time, labels=labels)
            prompts.append(labels is cond)
    states = [(number, branch) for number, _, branch in SEEN]
    of_cond = {s for s, is_cond in zip(states, prompts, strict=True) if is_cond}
    assert not of_cond & {s for s, is_cond in zip(states, prompts, strict=True) if not is_cond}
    # The unknown prompt that turns up first at 700 starts one clean run; from there on it is one.
    assert len({number for number, _ in states[2:]}) == 1 and len(set(states[2:])) == 2


def test_recomputed_embeddings_fall_back_to_the_ordinal(watched):
    for time in [900, 800, 700, 600, 500, 400]:
        for label in (1, 2):
            step(watched, time, labels=torch.tensor([label, label]))
    settled = [(number, branch) for number, index, branch in SEEN[-6:]]
    assert len({number for number, _ in settled}) == 1
    assert [branch for _, branch in settled] == ["call 0", "call 1"] * 3


def test_recomputed_embeddings_and_a_dropped_branch_are_ambiguous(watched):
    session = ah.active(watched)
    for i, time in enumerate([900, 800, 700, 600, 500, 400, 300]):
        for label in (1, 2)[: 1 if i == 5 else 2]:
            step(watched, time, labels=torch.tensor([label, label]))
    root = session.roots[0]
    run = root.recogniser._trail.get().run
    assert run.ambiguous is not None and "cache_context" in run.ambiguous


def test_a_schedule_view_tells_the_step_of_a_two_stage_solver(watched):
    labels = torch.tensor([1, 2])
    timesteps = torch.tensor([900, 700, 700, 500, 500])
    for time in timesteps:
        step(watched, time.expand(2), labels=labels)
    assert [index for _, index, _ in SEEN] == [0, 1, 2, 3, 4] and runs() == 1
    other = timesteps.clone()
    for time in other[2:]:
        step(watched, time.expand(2), labels=labels)
    assert runs() == 2


def test_a_prompt_changed_in_place_is_another_prompt(watched):
    labels = torch.tensor([1, 2])
    generate(watched, TIMES[:3], labels)
    labels.add_(1)
    generate(watched, TIMES[3:], labels)
    assert runs() == 2


# -- limits: what no host signal shows; said in docs/runs.md ------------------------------------


def test_limit_a_restart_at_a_lower_timestep_with_the_same_prompt_object(watched):
    labels = torch.tensor([1, 2])
    generate(watched, TIMES[:2], labels)
    generate(watched, TIMES[2:], labels)
    assert runs() == 1  # nothing tells; session.run() does
    SEEN.clear()
    for part in (TIMES[:2], TIMES[2:]):
        with ah.active(watched).run():
            generate(watched, part, labels)
    assert runs() == 2


def test_limit_a_repeated_timestep_by_value_is_a_clean_run(watched):
    generate(watched, [900, 700, 700, 500, 500], torch.tensor([1, 2]))
    assert runs() == 3  # a solver that evaluates twice is never reused


def test_limit_time_that_turns_inside_a_run_is_a_clean_run(watched):
    generate(watched, [900, 700, 500, 600, 500, 300], torch.tensor([1, 2]))
    assert [index for _, index, _ in SEEN] == [0, 1, 2, 0, 1, 2]


def test_limit_interleaved_generations_of_one_prompt_object_never_reuse(watched):
    labels = torch.tensor([1, 2])
    for time in TIMES:
        step(watched, time, labels=labels)
        step(watched, time, labels=labels)
    assert all(index == 0 for _, index, _ in SEEN[1::2])


def test_interleaved_generations_of_two_prompts_keep_apart(model):
    def generation(labels, seed):
        x = torch.randn(SMALL, generator=torch.Generator().manual_seed(seed))
        for time in TIMES:
            x = x - 0.1 * step(model, time, labels=labels, x=x)[:, :4]
            yield x

    a, b = two_prompts()
    with ah.enable(model, LazyStep.example()):
        alone = list(generation(a, 1))[-1]
    with ah.enable(model, LazyStep.example()):
        for x, _ in zip(generation(a, 1), generation(b, 2), strict=True):
            last = x
    assert torch.equal(alone, last)


# -- what a with statement holds open ------------------------------------------------------------

CADENCE = LazyStep(criterion="cadence", every=2, predictor="hold", warmup=1, cooldown=0)


def stream(model, seed, declare=contextlib.nullcontext):
    """A small generation that hands on every sample, as a server does."""
    with declare():
        x = torch.randn(SMALL, generator=torch.Generator().manual_seed(seed))
        labels = torch.tensor([1, 2])
        for time in range(900, 100, -100):
            x = x - 0.1 * step(model, time, labels=labels, x=x)[:, :4]
            yield x


def alone(model, *seeds):
    wanted = []
    for seed in seeds:
        with ah.enable(model, CADENCE) as session:
            wanted.append(list(stream(model, seed, session.run)))
            assert session.skips
    return wanted


def same(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("last", [0, 1])
def test_interleaved_generators_keep_their_declared_runs(model, last):
    wanted = alone(model, 1, 2)
    with ah.enable(model, CADENCE) as session:
        streams = [stream(model, seed, session.run) for seed in (1, 2)]
        got = list(zip(*streams, strict=True))
        for which in (1 - last, last):
            streams[which].close()
        assert all(same(g, w) for g, w in zip(zip(*got, strict=True), wanted, strict=True))
        assert session.tally.signals() == {"session.run()": 2}
        list(stream(model, 1))
        list(stream(model, 2))
        assert session.tally.signals()["timestep"] == 2


@pytest.mark.parametrize("anew", [False, True])
def test_a_declared_run_of_a_schedule_made_anew_at_each_step(model, anew):
    """And of a second generation in it, which begins clean."""
    kept = torch.linspace(999, 20, 20)
    labels = torch.tensor([1, 2])

    def generation():
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for i in range(20):
            t = (torch.linspace(999, 20, 20) if anew else kept)[i].expand(2)
            with torch.no_grad():
                out = model(x, t, class_labels=labels, return_dict=False)[0]
            x = x - 0.05 * out[:, :4]
        return x

    with ah.enable(model, CADENCE) as session, session.run():
        first = generation()
        seen = [(e.step, e.action) for e in session.trace if e.action != "note"]
        assert [step for step, _ in seen] == list(range(20))
        assert sum(action == "skip" for _, action in seen) > 5
        kept = kept.clone()  # a pipeline sets its schedule anew
        assert torch.equal(generation(), first)


def test_a_suspended_generator_keeps_its_run_and_its_pause_to_itself(model):
    (wanted,) = alone(model, 1)
    with ah.enable(model, CADENCE) as session:
        generation = stream(model, 1, session.run)
        got = [next(generation)]
        assert same(list(stream(model, 1)), wanted) and same([*got, *generation], wanted)
    with ah.enable(model, CADENCE) as session:
        generation = stream(model, 1, session.paused)
        plain = [next(generation)]
        assert same(list(stream(model, 1)), wanted)
        plain += generation
        assert session.inert_forwards == {"paused": len(wanted)} and not same(plain, wanted)


@pytest.mark.parametrize("declare", ["run", "paused"])
def test_a_generator_may_be_resumed_and_closed_anywhere(model, declare):
    def elsewhere(work):
        found = []
        thread = threading.Thread(target=lambda: found.append(work()))
        thread.start()
        thread.join()
        return found[0]

    with ah.enable(model, CADENCE) as session:
        wanted = list(stream(model, 1, getattr(session, declare)))
        generation = stream(model, 1, getattr(session, declare))
        got = [elsewhere(lambda: next(generation)) for _ in wanted[:-1]]
        assert same(got, wanted[:-1])
        assert elsewhere(generation.close) is None
        assert not session.schedules.explicit.everywhere() and not session.is_paused()
        assert not any(run.slots for run in session.tally._live)


def test_an_asynchronous_generator_may_be_closed_by_another_task(model):
    async def asynchronous(generation):
        with session.run() as run:
            for x in generation:
                yield x, run

    async def serve():
        generation = asynchronous(stream(model, 1))
        got = [await asyncio.create_task(anext(generation)) for _ in range(4)]
        await asyncio.create_task(generation.aclose())
        return got

    (wanted,) = alone(model, 1)
    with ah.enable(model, CADENCE) as session:
        got = asyncio.run(serve())
        assert same([x for x, _ in got], wanted[:4])
        assert got[0][1].ended and not got[0][1].slots
        assert session.tally.signals() == {"session.run()": 1}


@pytest.mark.parametrize("outside", [True, False])
def test_tasks_inside_a_declared_run_are_no_part_of_it(model, outside):
    async def task(seed):
        got = []
        for x in stream(model, seed):
            got.append(x)
            await asyncio.sleep(0)
        return got

    async def both(declare):
        with declare():
            return await asyncio.gather(task(1), task(2))

    wanted = alone(model, 1, 2)
    with ah.enable(model, CADENCE) as session:
        if outside:
            with session.run():
                got = asyncio.run(both(contextlib.nullcontext))
        else:
            got = asyncio.run(both(session.run))
    assert all(same(g, w) for g, w in zip(got, wanted, strict=True))


class Request:
    """Keeps a run open between calls, where no with statement shows."""

    def __init__(self, model, session, seed):
        self.open = contextlib.ExitStack()
        self.open.enter_context(session.run())
        self.samples = stream(model, seed)


def test_one_run_that_a_helper_opened_holds(model):
    @contextlib.contextmanager
    def wrapped():
        with session.run():
            yield

    (wanted,) = alone(model, 1)
    with ah.enable(model, CADENCE) as session:
        assert same(list(stream(model, 1, wrapped)), wanted)
        with wrapped():
            assert same(list(stream(model, 1)), wanted)
        request = Request(model, session, 1)
        assert same(list(request.samples), wanted)
        request.open.close()
        assert session.tally.signals() == {"session.run()": 3}


def test_a_run_and_a_pause_of_a_notebook_hold_in_later_cells(model):
    """IPython runs each statement of a cell by ``exec``, in a coroutine that it makes for it."""

    async def run_code(cell):
        exec(compile(cell, "cell", "exec"), space)

    def notebook(cell):
        with pytest.raises(StopIteration):
            run_code(cell).send(None)

    with ah.enable(model, Watch()) as session:
        space = {"stack": contextlib.ExitStack(), "session": session, "model": model, "step": step}
        notebook("run = stack.enter_context(session.run())")
        notebook("step(model, 900); step(model, 700)")
        assert session.tally.signals() == {"session.run()": 1} and space["run"].index == 1
        notebook("pause = session.paused(); pause.__enter__()")
        notebook("step(model, 500)")
        assert session.forwards == 2
        notebook("pause.__exit__(None, None, None); stack.close()")
        assert "has ended" not in str(session.report())


@pytest.mark.parametrize("opener", ["coroutine", "task of a cell"])
def test_a_run_whose_opener_has_ended_is_named(model, opener):
    async def enter():
        stack.enter_context(session.run())

    async def main():
        if opener == "coroutine":
            await enter()
        else:
            cell = "await sleep(0); stack.enter_context(session.run())"
            code = compile(cell, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            space = {"stack": stack, "session": session, "sleep": asyncio.sleep}
            await asyncio.create_task(eval(code, space))
        step(model, 900)

    with ah.enable(model, Watch()) as session, contextlib.ExitStack() as stack:
        asyncio.run(main())
        assert session.tally.signals() == {"timestep": 1}
        assert str(session.report()) == str(session.report())
        assert str(session.report()).count("has ended") == 1


def test_a_frame_at_the_address_of_an_opener_is_not_it(model):
    class Lazy:
        """Opens its run in the very method that makes its forwards."""

        def __init__(self):
            self.open, self.first = contextlib.ExitStack(), True

        def go(self):
            if self.first:
                self.open.enter_context(session.run())
            self.first = False
            step(model, 900)

    with ah.enable(model, Watch()) as session:
        one, two = Lazy(), Lazy()
        for lazy in (one, two, one, two, one):
            lazy.go()
        (ambiguous,) = session.tally.ambiguous().items()
        assert "several session.run() are open" in ambiguous[0] and ambiguous[1] == 3
        one.open.close()
        two.open.close()
        abandoned = Lazy()
        abandoned.go()
        abandoned.me = abandoned
        del abandoned, lazy
        gc.collect()
        assert not session.schedules.explicit.everywhere()


def test_runs_that_cannot_be_told_apart_are_computed_in_full(model):
    plain = [list(stream(model, seed)) for seed in (1, 2)]
    with ah.enable(model, CADENCE) as session:
        requests = [Request(model, session, seed) for seed in (1, 2)]
        got = list(zip(*(request.samples for request in requests), strict=True))
        assert all(same(g, w) for g, w in zip(zip(*got, strict=True), plain, strict=True))
        assert "several session.run() are open" in str(session.report()) and not session.skips
        for request in requests:
            request.open.close()
        assert not same(list(stream(model, 1, session.run)), plain[0])


def test_declared_runs_nest(model):
    wanted = alone(model, 1, 2)
    with ah.enable(model, CADENCE) as session, session.run() as outer:
        generation = stream(model, 1)
        got = [next(generation) for _ in range(3)]
        with session.run() as inner:
            assert same(list(stream(model, 2)), wanted[1])
        assert inner.ended and not outer.ended
        assert same([*got, *generation], wanted[0])


def test_a_declared_run_is_reset(model):
    (wanted,) = alone(model, 1)
    with ah.enable(model, CADENCE) as session, session.run() as run:
        next(stream(model, 2))
        session.reset()
        assert not run.slots and same(list(stream(model, 1)), wanted)
        assert session.tally.signals() == {"session.run()": 1}


def test_one_session_is_paused():
    models = [TINY["dit"].build() for _ in range(2)]
    one, two = (ah.enable(model, Watch()) for model in models)
    with one.paused():
        for model in models:
            step(model, 900)
    assert (one.forwards, two.forwards) == (0, 1)


def test_what_a_finished_task_set_is_nobodys(watched):
    labels = torch.tensor([1, 2])

    async def main():
        done = asyncio.Event()

        def later():
            step(watched, 500, labels=labels)
            done.set()

        async def request():
            step(watched, 900, labels=labels)
            asyncio.get_running_loop().call_later(0.1, later)

        await asyncio.create_task(request())
        gc.collect()
        await done.wait()

    asyncio.run(main())
    assert runs() == 2


# -- state ends with its run ---------------------------------------------------------------------


def loop(model, labels, seed=0, times=TIMES, shape=SMALL, stop=None):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for i, time in enumerate(times):
        if i == stop:
            raise KeyboardInterrupt
        x = x - 0.1 * step(model, time, shape, labels, x)[:, :4]
    return x


def test_threads_do_not_share(model):
    prompts = [torch.tensor([i, i + 1]) for i in range(4)]
    alone = []
    for i, labels in enumerate(prompts):
        with ah.enable(model, LazyStep.example()):
            alone.append(loop(model, labels, i))
    found = {}
    with ah.enable(model, LazyStep.example()):

        def work(i):
            for _ in range(3):
                found[i] = loop(model, prompts[i], i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(4))


def test_an_abort_leaves_nothing_behind(model):
    labels = torch.tensor([1, 2])
    with ah.enable(model, LazyStep.example()):
        clean = loop(model, labels)
    with ah.enable(model, LazyStep.example()):
        for stop in range(1, len(TIMES)):
            with pytest.raises(KeyboardInterrupt):
                loop(model, labels, seed=7, stop=stop)
            assert torch.equal(loop(model, labels), clean)


def test_cached_tensors_die_when_the_prompt_does(model):
    with ah.enable(model, LazyStep.example()) as session:
        labels = torch.tensor([1, 2])
        loop(model, labels)
        run = session.roots[0].recogniser._trail.get().run
        histories = [getattr(slot.value, "history", None) for slot in run.slots.values()]
        held = [weakref.ref(v) for h in histories if h is not None for v in h.values[0]]
        assert held and all(ref() is not None for ref in held)
        del labels, run, histories
        gc.collect()
        assert all(ref() is None for ref in held)


def test_a_context_keeps_nothing_of_a_session_that_is_gone(model):
    def generation():
        with ah.enable(model, LazyStep.example()) as session:
            loop(model, torch.tensor([1, 2]))
            return weakref.ref(session.roots[0].recogniser._trail.get())

    generation()
    gc.collect()
    before = len(contextvars.copy_context())
    trails = [generation() for _ in range(3)]
    gc.collect()
    assert [trail() for trail in trails] == [None] * 3
    assert len(contextvars.copy_context()) == before
