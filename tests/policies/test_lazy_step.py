"""LazyStep: what it skips, what it puts there instead, and what it reads to decide."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY
from torch import nn

import accelerate_hooks as ah
from accelerate_hooks.artifact import Artifact
from accelerate_hooks.errors import ArtifactError, SpecError, UnsupportedModelError
from accelerate_hooks.history import History, RowHistory, weights
from accelerate_hooks.policies import LazyStep
from accelerate_hooks.policies._pace import Pace
from accelerate_hooks.policies._pattern import allocate, regular_pattern
from accelerate_hooks.policies._quantity import converted, mixing
from accelerate_hooks.run import Run, Step

ORDERS = {"hold": 0, "linear": 1, "taylor2": 2, "taylor3": 3}
SCOPES = ("model", "stack", "site")
CRITERIA = ("cadence", "change", "error")
EAGER = {"warmup": 1, "cooldown": 0, "max_age": 8, "corrector": False, "time": "index"}


class Curve(nn.Module):
    """A denoiser whose output follows a function of time, whatever its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.calls = 0

    def forward(self, hidden_states, timestep):
        self.calls += 1
        return self.function(float(timestep)) * torch.ones_like(hidden_states)


def follow(function, policy, steps=24, xs=None):
    """(outputs, indices of computed steps, session) of a run over the curve."""
    model = Curve(function).eval()
    outputs, computed = [], []
    with torch.no_grad(), ah.enable(model, policy, strict=False) as session, session.run(steps):
        for i in range(steps):
            before = model.calls
            x = torch.ones(1, 2, dtype=torch.float64) if xs is None else xs[i]
            outputs.append(model(x, torch.tensor([i / steps], dtype=torch.float64)))
            computed += [i] * (model.calls - before)
    return outputs, computed, session


def denoise(model, inputs, steps=8, scale=0.7):
    """A bare loop: the sample moves along the output; all outputs."""
    given, outputs = dict(inputs), []
    with torch.no_grad():
        for i in range(steps):
            given["timestep"] = torch.full_like(inputs["timestep"], 900 * (1 - i / steps))
            out = _flat(model(**given))[0]
            outputs.append(out.clone())
            x = given["hidden_states"]
            moved = out[:, : x.shape[1]] if out.ndim == 4 else out
            given["hidden_states"] = x - scale / steps * moved.tanh()
    return outputs


def skips(session):
    return [(e.step, e.branch, e.site) for e in session.trace if e.action in ("skip", "rows")]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def dit():
    return TINY["dit"].build()


@pytest.fixture(scope="module")
def flux():
    return TINY["flux"].build()


# -- nothing skipped -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("zero", ["max_age", "amount"])
def test_exact_settings_are_bit_identical(dit, scope, criterion, zero):
    amounts = {"every": 1, "tolerance": 0.0, "threshold": 0.0, "warmup": 1, "cooldown": 0}
    policy = LazyStep(
        scope=scope, criterion=criterion, **({"max_age": 0} if zero == "max_age" else amounts)
    )
    inputs = TINY["dit"].inputs(2)
    plain = denoise(dit, inputs, 5)
    with ah.enable(dit, policy) as session:
        assert same(denoise(dit, inputs, 5), plain)
    assert not skips(session)


# -- predictions -----------------------------------------------------------------------------------


@given(
    order=st.integers(0, 3),
    gaps=st.lists(st.floats(0.05, 2.0), min_size=5, max_size=5),
    coefficients=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    down=st.booleans(),
)
def test_history_continues_polynomials(order, gaps, coefficients, down):
    times = np.cumsum(gaps) * (-1 if down else 1)
    wanted = np.polyval(coefficients[: order + 1], times)
    history = History(order)
    for step, (time, y) in enumerate(zip(times[:4], wanted[:4], strict=True)):
        history.add(step, float(time), (torch.full((2, 3), float(y), dtype=torch.float64),))
        assert len(history) == min(step + 1, order + 1)
    got = history.predict(float(times[4]))[0].numpy()
    scale = np.abs(np.polyval(np.abs(coefficients), np.abs(times))).max() + 1
    amplified = sum(map(abs, weights(history.times, float(times[4]))))
    assert np.abs(got - wanted[4]).max() <= 1e-12 * scale * amplified


@pytest.mark.parametrize(("predictor", "order"), ORDERS.items())
def test_skipped_steps_lie_on_the_polynomial(predictor, order):
    coefficients = [2.0, -3.0, 1.5, 0.7][: order + 1]
    policy = LazyStep(**EAGER, criterion="cadence", every=4, predictor=predictor)
    outputs, computed, _ = follow(lambda t: float(np.polyval(coefficients, t)), policy)
    assert len(computed) < 14
    for i, out in enumerate(outputs):
        assert out[0, 0].item() == pytest.approx(np.polyval(coefficients, i / 24), abs=1e-9)


def test_hold_gives_the_last_computed_output():
    policy = LazyStep(**EAGER, criterion="cadence", every=3, predictor="hold")
    outputs, computed, _ = follow(math.sin, policy, 12)
    assert computed == [0, 3, 6, 9]
    assert all(torch.equal(out, outputs[i - i % 3]) for i, out in enumerate(outputs))


# -- when to compute -------------------------------------------------------------------------------


@given(
    predictor=st.sampled_from(list(ORDERS)),
    every=st.integers(1, 6),
    warmup=st.integers(0, 6),
    cooldown=st.integers(0, 5),
    max_age=st.integers(0, 6),
    steps=st.integers(1, 20),
)
@settings(max_examples=30)
def test_cadence_computes_the_steps_it_says(predictor, every, warmup, cooldown, max_age, steps):
    policy = LazyStep(
        criterion="cadence", predictor=predictor, every=every, warmup=warmup, cooldown=cooldown,
        max_age=max_age,
    )  # fmt: skip
    wanted: list[int] = []
    for i in range(steps):
        always = i < warmup or i >= steps - cooldown or len(wanted) <= ORDERS[predictor]
        if always or i - wanted[-1] >= min(every, max_age + 1):
            wanted.append(i)
    _, computed, session = follow(math.sin, policy, steps)
    assert computed == wanted
    assert session.host_reads == 0


@given(
    changes=st.lists(st.floats(0.0, 0.3), min_size=15, max_size=15),
    thresholds=st.lists(st.floats(0.0, 2.0), min_size=4, max_size=4),
    metric=st.sampled_from(["l1", "cosine"]),
)
@settings(max_examples=15)
def test_a_larger_threshold_never_skips_fewer(changes, thresholds, metric):
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(1, 32, generator=generator, dtype=torch.float64)]
    for change in changes:
        xs.append(xs[-1] + change * torch.randn(1, 32, generator=generator, dtype=torch.float64))
    counts = []
    for threshold in sorted(thresholds):
        policy = LazyStep(**EAGER, criterion="change", threshold=threshold, metric=metric)
        _, computed, _ = follow(math.sin, policy, len(xs), xs)
        counts.append(len(computed))
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("predictor", ["hold", "linear", "taylor2"])
def test_a_larger_tolerance_never_skips_fewer(predictor):
    counts = []
    for tolerance in (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0):
        policy = LazyStep(**EAGER, predictor=predictor, tolerance=tolerance)
        outputs, computed, _ = follow(lambda t: 2 + math.sin(3 * t), policy, 40)
        counts.append(len(computed))
        worst = max(
            abs(float(out[0, 0]) / (2 + math.sin(3 * i / 40)) - 1) for i, out in enumerate(outputs)
        )
        assert worst <= 10 * tolerance + 1e-9, "the error is far over the tolerance"
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 40 > counts[-1]


def test_a_span_grows_under_the_tolerance_and_shrinks_over_it():
    pace = Pace()
    for error, age, wanted in ((1e-9, 1, 2), (1e-9, 2, 4), (0.02, 4, 5), (0.08, 5, 2), (9.0, 4, 1)):
        pace.values, pace.measured_age = [error], age
        assert pace.choose_span(0.02, 1) == wanted
    pace.values = [math.nan]
    assert pace.choose_span(0.02, 1) == 1


def test_a_branch_that_was_away_is_computed():
    """A guidance interval drops a branch: it must not be predicted from before the interval."""
    model = Curve(math.sin).eval()
    model.cache_context = lambda name: torch.no_grad()
    policy = LazyStep(**EAGER, criterion="cadence", every=2, predictor="hold")
    seen = {}
    with torch.no_grad(), ah.enable(model, policy) as session, session.run(9):
        for i in range(9):
            for name in ("cond", "uncond")[: 1 if 3 <= i <= 5 else 2]:
                before = model.calls
                with model.cache_context(name):
                    model(torch.ones(1, 2), torch.tensor([i / 9]))
                seen[i, name] = model.calls - before
    assert seen[7, "cond"] == 0, "nothing was skipped"
    assert seen[6, "uncond"] == 1
    assert [seen[i, "cond"] for i in range(9)] == [1, 0] * 4 + [1]


# -- host reads ------------------------------------------------------------------------------------


def reads(model, policy, steps=10):
    """Host reads of each forward in the second of two runs, and what was skipped."""
    inputs, counts = TINY["flux"].inputs(1), []
    with ah.enable(model, policy) as session:
        denoise(model, inputs, 3)
        session.reset()
        handle = model.register_forward_pre_hook(lambda *_: counts.append(session.host_reads))
        denoise(model, inputs, steps)
        handle.remove()
        counts.append(session.host_reads)
    return [b - a for a, b in itertools.pairwise(counts)], skips(session)


LOOSE = {"threshold": 9.0, "tolerance": 9.0, "every": 2}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("lagged", [False, True])
def test_host_reads_are_as_declared(flux, scope, criterion, lagged):
    if lagged and (scope != "site" or criterion == "cadence"):
        with pytest.raises(SpecError, match="lagged"):
            LazyStep(scope=scope, criterion=criterion, lagged=True)
        return
    policy = LazyStep(scope=scope, criterion=criterion, lagged=lagged, **EAGER, **LOOSE)
    counts, skipped = reads(flux, policy)
    assert skipped
    most = {"ahead": 0, "step": 1}.get(policy.decides)
    if most is None:
        assert max(counts) > 1 and not lagged
    else:
        assert max(counts) == most, counts


def test_lagged_errors_decide_as_errors_do(flux):
    """The error of a computed step is known one step later anyway: only the reads differ."""
    policy = LazyStep(scope="site", **EAGER, tolerance=1.0)
    eager, lagged = (
        reads(flux, dataclasses.replace(policy, lagged=lagged)) for lagged in (False, True)
    )
    assert eager[1] == lagged[1] and eager[1]
    assert sum(eager[0]) > 3 * sum(lagged[0])


def test_lagged_changes_are_those_of_the_step_before():
    pace = Pace()
    decisions = []
    for step, value in enumerate([0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]):
        pace.enter(step)
        skip = step > 1 and pace.change_since(lagged=True) < 0.25
        pace.skip = skip
        if not skip:
            pace.restart()
        pace.values = [value]
        decisions.append(skip)
    # 0.1 foretold; 0.1 + 0.1; 0.2 + 0.1: computed; and again
    assert decisions == [False, False, True, True, False, True, True]


# -- stacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", [None, "transformer_blocks.*", "*blocks.[02]"])
@pytest.mark.parametrize("name", ["flux", "sd3", "dit", "wan"])
def test_a_stack_reuses_what_its_blocks_added(name, only):
    """At constant inputs what was added is what would be: to x and to the context, over the whole
    chain or the part of it that ``only`` leaves."""
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    if only is not None and name != "flux":
        pytest.skip("one chain is enough")
    policy = LazyStep(scope="stack", criterion="cadence", predictor="hold", every=3, **EAGER)
    with torch.no_grad(), ah.enable(model, policy, only=only) as session:
        plain = [t.clone() for t in _flat(model(**inputs))]
        with session.run():
            for i in range(6):
                time = inputs["timestep"].double() * (1 - 1e-12 * i)
                got = _flat(model(**{**inputs, "timestep": time}))
    assert skips(session)
    for a, b in zip(got, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), float((a - b).abs().max())


def _flat(out):
    return [t for t in (out.values() if isinstance(out, dict) else out) if torch.is_tensor(t)]


# -- quantities ------------------------------------------------------------------------------------


@given(
    sigma=st.floats(0.05, 0.95),
    kind=st.sampled_from(["velocity", "epsilon", "v", "sample"]),
    quantity=st.sampled_from(["clean", "noise"]),
)
def test_quantities_are_made_of_the_output_and_back(sigma, kind, quantity):
    alpha = 1 - sigma if kind == "velocity" else math.sqrt(1 - sigma**2)
    clean, noise = torch.randn(2, 5, dtype=torch.float64).unbind()
    x = alpha * clean + sigma * noise
    output = {
        "velocity": noise - clean, "epsilon": noise, "v": alpha * noise - sigma * clean,
        "sample": clean,
    }[kind]  # fmt: skip
    step = Step(Run("test"), 0, None, "denoise", "", "", noise=(alpha, sigma), prediction=kind)
    a, b = mixing(step, quantity)
    made = a * x + b * output
    wanted = {"clean": clean, "noise": noise}[quantity]
    if abs(b) > 2e-3:  # nearer to zero the output is not in it
        assert torch.allclose(made, wanted, atol=1e-9)
    assert torch.allclose((made - a * x) / b, output, atol=1e-9)


# -- gates -----------------------------------------------------------------------------------------


def gates(model, make, steps=8):
    """An artifact with ``make(steps, width)`` as the gates of every site."""
    probe = LazyStep(scope="site", criterion="cadence", max_age=0)
    with ah.enable(model, probe) as session:
        sites = session.sites
    width = model.config.num_attention_heads * model.config.attention_head_dim
    tensors = {site.name: make(steps, width) for site in sites}
    return Artifact.create(tensors, policy="lazy_step", model=model, steps=steps)


def gated(model, inputs, artifact, **more):
    policy = LazyStep(
        scope="site", criterion="gates", artifact=artifact,
        **{**EAGER, "predictor": "hold", **more},
    )  # fmt: skip
    with ah.enable(model, policy) as session:
        return denoise(model, inputs, 8), session


def test_gates_run_at_one_half_and_above(dit):
    inputs, artifact = TINY["dit"].inputs(2), gates(dit, torch.zeros)
    got, session = gated(dit, inputs, artifact)
    assert same(got, denoise(dit, inputs, 8)) and not skips(session)


@pytest.mark.parametrize("predictor", ["hold", "linear"])
def test_gates_that_reuse_always_are_a_cadence(dit, predictor):
    inputs, artifact = TINY["dit"].inputs(2), gates(dit, torch.zeros)
    got, session = gated(dit, inputs, artifact, threshold=0.9, predictor=predictor)
    policy = LazyStep(scope="site", criterion="cadence", every=9, predictor=predictor, **EAGER)
    with ah.enable(dit, policy) as other:
        wanted = denoise(dit, inputs, 8)
    assert [s[::2] for s in skips(session)] == [s[::2] for s in skips(other)]
    assert same(got, wanted)


def test_rows_are_decided_each_for_itself(dit, predictor="hold"):
    generator = torch.Generator().manual_seed(0)
    artifact = gates(dit, lambda *s: torch.randn(*s, generator=generator))
    inputs = TINY["dit"].inputs(3)
    together, session = gated(dit, inputs, artifact, predictor=predictor)
    assert any(e.action == "rows" for e in session.trace), "rows were never decided apart"
    for row in range(3):
        mine = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in inputs.items()}
        alone, _ = gated(dit, mine, artifact, predictor=predictor)
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[row : row + 1], b, rtol=1e-3, atol=1e-4)


def test_artifacts_are_checked(dit, flux, tmp_path):
    artifact = gates(dit, torch.zeros)
    inputs = TINY["dit"].inputs(1)
    with pytest.raises(ArtifactError, match=r"config_hash|model"):
        ah.enable(flux, LazyStep(scope="site", criterion="gates", artifact=artifact))
    with pytest.raises(ArtifactError, match="needs an artifact"):
        ah.enable(dit, LazyStep(scope="site", criterion="gates"))
    with pytest.raises(SpecError, match="scope"):
        LazyStep(criterion="gates", artifact=artifact)
    policy = LazyStep(scope="site", criterion="gates", artifact=artifact, warmup=1, cooldown=0)
    with (
        ah.enable(dit, policy) as session,
        session.run(total=5),
        pytest.raises(ArtifactError, match="fitted for 8 steps, this run has 5"),
    ):
        denoise(dit, inputs, 5)
    assert same(denoise(dit, inputs, 3), denoise(dit, inputs, 3))
    path = tmp_path / "gates.safetensors"
    artifact.save(path)
    assert Artifact.load(path) == artifact
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        Artifact.load(path)


@settings(max_examples=40)
@given(
    order=st.integers(0, 3),
    plan=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8),
    stays=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_rows_have_histories_of_their_own(order, plan, stays):
    """A second-order solver stays at a time for two evaluations."""
    clock = list(itertools.accumulate(0 if stay else 1 for stay in stays))
    generator = torch.Generator().manual_seed(0)
    together, alone = RowHistory(order), [History(order) for _ in range(3)]
    for step, rows in enumerate([[True] * 3] * (order + 1) + plan):
        values = (torch.randn(3, 2, 4, generator=generator), torch.randn(3, 5, generator=generator))
        if together.ready:
            got = together.predict(clock[step] + 0.5)
            for row, history in enumerate(alone):
                for a, b in zip(got, history.predict(clock[step] + 0.5), strict=True):
                    assert torch.allclose(a[row : row + 1], b, rtol=1e-4, atol=1e-3)
            assert together.ages(step) == [history.age(step) for history in alone]
        rows = rows if together.ready else [True] * 3
        together.add(step, float(clock[step]), values, rows)
        for row in (row for row in range(3) if rows[row]):
            alone[row].add(step, float(clock[step]), tuple(v[row : row + 1] for v in values))


@pytest.mark.parametrize("make", [History, RowHistory])
def test_a_history_that_somebody_wrote_to_is_gone(make):
    history, values = make(1), [torch.randn(2, 3) for _ in range(3)]
    for step, value in enumerate(values[:2]):
        history.add(step, float(step), (value,))
    assert history.ready
    values[1].mul_(2)
    assert not history.ready
    history.add(2, 2.0, (values[2],))
    assert not history.ready


@given(st.integers(0, 4), st.integers(1, 30), st.integers(0, 30), st.integers(1, 4))
def test_regular_patterns(start, length, count, max_age):
    window = range(start, start + length)
    if count > max_age * (length + 1) // (max_age + 1):
        with pytest.raises(SpecError, match="smaller target"):
            regular_pattern(window, count, max_age)
        return
    steps = regular_pattern(window, count, max_age)
    assert len(steps) == count and set(steps) <= set(window)
    runs = "".join("x" if s in steps else " " for s in window).split()
    assert all(len(run) <= max_age for run in runs)


@pytest.mark.parametrize("max_age", [1, 2])
def test_gates_are_put_where_errors_cancel(max_age):
    """Steps of twice the effect with signs in turn: reused in pairs they cancel, but one alone, or
    two of the same sign, cost more than the small ones."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(64, 1, 1, generator=generator)
    sign = torch.tensor([1.0, 1, -1, -1] * 5)[None, :, None]
    effects = direction * sign * torch.tensor([2.0, 1.0, 2.0])
    effects[:, :, 1] = torch.randn(64, 20, generator=generator)
    window = range(3, 19)
    mask = allocate(effects, target=0.2, window=window, max_age=max_age, tries=4000)
    assert mask.sum() == 12
    assert not mask[:3].any() and not mask[19:].any()
    runs = mask.unfold(0, max_age + 1, 1).all(-1)
    assert not runs.any(), "reused too often in a row"
    summed = (effects * mask).sum((1, 2)).square().mean()
    assert summed < 0.2 * (effects * mask).square().sum((1, 2)).mean()


@pytest.mark.slow
def test_fitting_resumes_and_leaves_the_model_alone(tmp_path):
    from accelerate_hooks.demo.pipeline import random_digits_pipeline

    pipe = random_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.transformer.proj_out.bias.requires_grad_(False)
    data = [
        {
            "class_labels": [1, 2], "num_inference_steps": 6, "output_type": "latent",
            "generator": torch.Generator(),
        }
        for _ in range(2)
    ]  # fmt: skip
    mould = LazyStep(scope="site", criterion="gates", warmup=2, cooldown=0)

    def fit(count, resume):
        for seed, item in enumerate(data):
            item["generator"].manual_seed(seed)
        given = {"target": 0.3, "probes": 2, "resume": resume, "progress": False}
        return mould.fit(pipe, data[:count], **given)

    whole = fit(2, None)
    fit(1, str(tmp_path / "state.pt"))
    resumed = fit(2, str(tmp_path / "state.pt"))
    assert whole.artifact.tensors.keys() == resumed.artifact.tensors.keys()
    for site, weight in whole.artifact.tensors.items():
        assert weight[2:].abs().amax(1).min() > 0, f"{site} learned nothing"
        assert torch.equal(weight, resumed.artifact.tensors[site]), site
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter.grad is None, name
        assert parameter.requires_grad == (name != "proj_out.bias"), name
    assert ah.active(pipe) is None
    with ah.enable(pipe, whole) as session:
        assert torch.isfinite(pipe(**data[0]).images).all()
    visits = len(session.sites) * 6 * 2
    assert abs(len(skips(session)) / visits - 0.3) < 0.05


# -- bounds and bad input --------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_caches_over_the_cap_are_dropped_and_reported(dit, scope):
    inputs = TINY["dit"].inputs(2)
    policy = LazyStep(scope=scope, criterion="cadence", every=2, max_cache_bytes=64, **EAGER)
    with ah.enable(dit, policy) as session:
        with pytest.warns(ah.InertWarning, match="max_cache_bytes=64"):
            got = denoise(dit, inputs)
        assert session.dropped_for_bytes > 0
        assert "max_cache_bytes was passed" in session.report().to_dict()["never"]
    assert same(got, denoise(dit, inputs)) and not skips(session)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_nan_stays_in_its_run(dit, scope, criterion):
    inputs = TINY["dit"].inputs(1)
    policy = LazyStep(scope=scope, criterion=criterion, **EAGER, **LOOSE)
    with ah.enable(dit, policy) as session:
        denoise(dit, inputs, 2)
        session.reset()
        wanted = denoise(dit, inputs)
        session.reset()
        broken = {**inputs, "hidden_states": inputs["hidden_states"] * math.nan}
        assert all(out.isnan().all() for out in denoise(dit, broken))
        assert same(denoise(dit, inputs), wanted)
    assert skips(session)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scope": "block"}, {"every": 0}, {"max_age": -1}, {"warmup": -1}, {"cooldown": -1},
        {"tolerance": math.nan}, {"threshold": -0.1}, {"tolerance": math.inf},
        {"max_cache_bytes": 0}, {"preset": "fastest"}, {"predictor": "cubic"},
        {"lagged": True}, {"criterion": "gates"}, {"metric": "cosine"},
        {"quantity": "clean", "scope": "stack"}, {"every": "3"}, {"every": 2.5}, {"every": True},
        {"warmup": 1.5}, {"max_age": math.inf}, {"tolerance": "x"}, {"corrector": "no"},
        {"lagged": "yes"}, {"artifact": 3}, {"max_cache_bytes": "1GB"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(SpecError, match=f"lazy_step.*({'|'.join([*wrong, 'scope'])})"):
        LazyStep(**wrong)


@given(
    preset=st.sampled_from(["safe", "balanced", "fast"]),
    scope=st.sampled_from(SCOPES),
    predictor=st.sampled_from(list(ORDERS)),
    criterion=st.sampled_from(CRITERIA),
    tolerance=st.none() | st.floats(0, 10),
    every=st.none() | st.integers(1, 9),
    warmup=st.integers(0, 9),
    data=st.data(),
)
def test_specs_say_what_the_policy_is(data, **fields):
    can = fields["scope"] == "site" and fields["criterion"] != "cadence"
    policy = LazyStep(**fields, lagged=data.draw(st.booleans()) if can else False)
    assert [item.policy for item in ah.parse(str(policy))] == [policy]


def test_presets_fill_in_what_is_not_given():
    presets = [LazyStep(preset=name) for name in ("safe", "balanced", "fast")]
    for name in ("tolerance", "threshold", "every", "max_age"):
        values = [policy.setting(name) for policy in presets]
        assert values == sorted(values) and values[0] < values[-1]
        assert LazyStep(preset="fast", **{name: 1}).setting(name) == 1


def test_too_few_steps_are_said_once():
    policy = LazyStep(criterion="cadence", warmup=2, cooldown=1, corrector=False)
    model = Curve(math.sin).eval()
    with torch.no_grad(), ah.enable(model, policy) as session:
        with session.run(3), pytest.warns(ah.InertWarning, match="3 steps are too few"):
            model(torch.ones(1, 2), torch.tensor([0.1]))
        with session.run(3):
            model(torch.ones(1, 2), torch.tensor([0.1]))
        with session.run(4):
            model(torch.ones(1, 2), torch.tensor([0.1]))
        assert sum("too few" in note for note in session.notes) == 1


def test_an_unknown_end_is_said_once():
    model = Curve(math.sin).eval()
    with torch.no_grad(), ah.enable(model, LazyStep(criterion="cadence")) as session:
        for _ in range(2):
            with session.run():
                model(torch.ones(1, 2), torch.tensor([0.1]))
        assert sum("number of steps is not known" in note for note in session.notes) == 1


@pytest.mark.parametrize("quantity", ["clean", "noise"])
def test_a_quantity_wants_an_output_with_the_samples_shape(quantity):
    """Where a picture is given beside the sample, or a variance is told too, nothing follows about
    the clean sample."""
    call = SimpleNamespace(
        x=torch.zeros(1, 8, 4, 4), site=SimpleNamespace(module=None),
        step=SimpleNamespace(noise=(0.5, 0.5), prediction="epsilon"),
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="use quantity='output'"):
        converted(call, quantity, (torch.zeros(1, 4, 4, 4), None))
    assert converted(call, "output", (torch.zeros(1, 4, 4, 4), None))
