"""DraftAttention: right against a slow oracle, on every family whose layout is known."""

import dataclasses
import math
import statistics
from typing import Any, ClassVar

import contract
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_models import MOE
from tiny_models import TINY
from torch.nn import functional as F

from accelerate_hooks import (
    ArtifactError,
    DraftAttention,
    Effect,
    LazyStep,
    Policy,
    SpecError,
    UnsupportedModelError,
    enable,
)
from accelerate_hooks.artifact import Artifact
from accelerate_hooks.kernels import FALLBACKS, attention_mass, select_blocks, tile_order
from accelerate_hooks.patches import grids
from accelerate_hooks.policies import _budgets
from accelerate_hooks.policies._regions import Plan, order_of, region_of
from accelerate_hooks.site import TokenLayout

# name: where text stands in the joint sequence
FAMILIES = {
    "wan": None,
    "wan_vace": None,
    "hunyuan_video": "last",
    "cogvideox": "first",
    "mochi": "last",
    "ltx": None,
    "flux": "first",
    "sd3": "last",
    "pixart": None,
    "dit": None,
    "qwenimage": "first",
    "unet": None,
}
SMALL: dict[str, Any] = {"pool": (1, 2, 2), "dense_steps": 0, "dense_blocks": 0}


def few(**settings: Any) -> DraftAttention:
    return DraftAttention(**(SMALL | settings))


# -- order -----------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    grid = tuple(draw(st.integers(1, 6)) for _ in range(3))
    visual, text = math.prod(grid), draw(st.integers(0, 5))
    where = draw(st.sampled_from([None, "first", "last"])) if text else None
    start = {None: 0, "first": 0, "last": visual}[where]
    layout = TokenLayout(*grid, slice(start, start + text) if where else None)
    region = tuple(draw(st.integers(1, 4)) for _ in range(3))
    return layout, region, visual + (text if where else 0)


@given(layouts())
def test_reorder_and_its_inverse_cancel(drawn):
    layout, region, tokens = drawn
    plan = Plan.of(
        layout, tokens, torch.device("cpu"), pool=region, rule="row", sinks=0, causal=False
    )
    x = torch.randn(1, 2, tokens, 3)
    assert torch.equal(plan.restore(plan.reorder(x)), x)


@given(layouts())
def test_tokens_of_the_grid_come_first_and_text_behind(drawn):
    layout, region, tokens = drawn
    order = order_of(layout, region, tokens)
    same = torch.arange(tokens)
    order = same if order is None else order
    assert sorted(order.tolist()) == same.tolist()
    start = 0 if layout.text is None or layout.text.start else layout.text.stop
    inside = tile_order(layout.grid, region)
    inside = same[: layout.visual] if inside is None else inside
    assert torch.equal(order[: layout.visual] - start, inside)


@pytest.mark.parametrize("grid", [(1, 32, 48), (2, 30, 52), (2, 30, 45), (1, 52, 76)])
def test_attention_that_is_local_is_found_at_any_size(grid):
    """Gaussian in space and time; 480p of Wan, CogVideoX, a wide picture of Flux: what the draft
    keeps, of what an oracle under the same rule does beyond random blocks."""
    layout = TokenLayout(*grid)
    plan = Plan.of(
        layout, layout.visual, torch.device("cpu"), pool=None, rule="quantile", sinks=0,
        causal=False,
    )  # fmt: skip
    at = torch.stack(torch.unravel_index(torch.arange(layout.visual), grid), -1)
    at = (at - at.float().mean(0)) / torch.tensor([1.0, 4.0, 4.0])
    one = torch.ones(layout.visual, 1)
    q = plan.reorder(torch.cat((at, one), -1)[None, None])
    k = plan.reorder(torch.cat((at, -(at**2).sum(-1, keepdim=True) / 2), -1)[None, None])
    true = attention_mass(q, k, plan.block, scale=1.0)
    draft, oracle = (
        (true * plan.selection.choose(scores, 0.25)).sum(-1).mean().item()
        for scores in (plan.draft(q, k, 1.0), true)
    )
    assert oracle > 0.85 and (draft - 0.25) / (oracle - 0.25) > 0.85


@pytest.mark.parametrize(
    ("grid", "region"),
    [
        ((21, 30, 52), (1, 8, 16)),
        ((1, 64, 64), (1, 8, 16)),
        ((16, 8, 8), (2, 8, 8)),
        ((1, 1, 3000), (1, 1, 128)),
        ((16, 5, 100), (2, 4, 16)),
    ],
)
def test_regions_hold_128_tokens_by_default(grid, region):
    assert region_of(None, TokenLayout(*grid)) == region
    assert math.prod(region) == 128


# -- against a slow oracle -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow(Policy):
    """The same blocks, as a mask over all tokens in their own order, by dense attention: at every
    visit, on what that visit is given, so that no tie between blocks can fall another way."""

    name: ClassVar[str] = "slow"
    like: Any = None
    seen: list = dataclasses.field(default_factory=list)

    @property
    def kinds(self):
        return ("attention",)

    def acts(self, site):
        return frozenset({Effect.REPLACE})

    def around(self, call):
        return call.attention(lambda a: self.attend(call, a))

    def attend(self, call, a):
        prepared = self.like.prepare(call, a)
        if prepared is None:
            return a.default()
        plan, q, k, _, seen, scale = prepared
        mask = plan.selection.choose(self.like.draft(call, plan, q, k, scale, seen), 0.5)
        tokens = q.shape[2]
        dense = mask.repeat_interleave(plan.block, 2).repeat_interleave(plan.block, 3)
        dense = dense[:, :, :tokens, :tokens]
        if seen is not None:
            dense = dense & seen[:, None, None]
        dense = plan.restore(plan.restore(dense).transpose(2, 3)).transpose(2, 3)
        if a.is_causal:
            dense = dense & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        k, v = (t.repeat_interleave(a.groups, 1) for t in (a.k, a.v))
        wanted = F.scaled_dot_product_attention(a.q, k, v, dense, scale=scale)
        got = self.like._attend(call, a, [])
        self.seen.append((a.layout.at(tokens), dense, got, wanted, a.default()))
        return got


# Models that ask which implementation of attention they have, or name its arguments.
ASKING = ("falcon", "deepseek_v32", "glm_moe_dsa", "afmoe", "minimax_m3_vl", "hy_v4", "axk2")


@pytest.mark.parametrize("name", [
    *ASKING, *(pytest.param(n, marks=pytest.mark.slow) for n in {**TINY, **MOE} if n not in ASKING)
])  # fmt: skip
def test_what_leaves_nothing_out_changes_no_model(name):
    """Attention is reached through the model's own config, which must look as it did."""
    tiny = TINY.get(name) or MOE[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    try:
        session = enable(model, DraftAttention.exact())
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    with session, torch.no_grad():
        got = contract.flat(model(**inputs))
    with torch.no_grad():
        wanted = contract.flat(model(**inputs))
    assert all(contract.same(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", ["falcon", "bart", "t5", "whisper", "afmoe"])
def test_generation_at_zero_is_the_models_own(name):
    tiny = TINY.get(name) or MOE[name]
    model, inputs = tiny.build(), tiny.inputs(2)
    given = {k: v for k, v in inputs.items() if k in ("input_ids", "input_features")}

    def tokens():
        return model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False)

    wanted = tokens()
    with enable(model, DraftAttention.exact()):
        assert torch.equal(tokens(), wanted)
    with enable(model, few(sparsity=0.5), strict=False):
        tokens()


@pytest.mark.parametrize(("given", "words"), [
    ({"data": None}, "keyword arguments"), ({"data": [None]}, "keyword arguments"),
    ({"data": []}, "at least one"), ({"visits": 0}, "visits=0"), ({"visits": "a"}, "visits"),
    ({"target": "a"}, "target='a'"), ({"target": 0.01}, "0.05 <= target"),
])  # fmt: skip
def test_fitting_says_what_it_wants(given, words):
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(2)
    given = {"data": [inputs], "progress": False} | given
    with pytest.raises(SpecError, match=words):
        few(sparsity=0.5).fit(model, **given)


@pytest.mark.parametrize("name", [*FAMILIES, "llama", "bert", "whisper"])
def test_it_agrees_with_the_slow_oracle(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    slow = Slow(like=few(sparsity=0.5, select="row"))
    with torch.no_grad(), enable(model, slow) as session:
        model(**inputs)
        assert sum(session.skips.values())
    assert slow.seen
    for layout, dense, got, wanted, plain in slow.seen:
        assert not torch.allclose(wanted, plain, rtol=1e-3)
        assert (got - wanted).norm() <= 5e-6 * wanted.norm()
        if layout is not None and layout.text is not None:
            assert dense[:, :, layout.text].all() and dense[..., layout.text].all()
        assert dense.any(-1).all()


def test_every_family_in_the_table_is_tested():
    classes = {type(TINY[name].build()).__name__ for name in FAMILIES}
    assert classes == set(grids.LAYOUTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_are_those_of_the_tokens(name):
    """The family's rule gives the number of tokens that attention has, and where text stands."""
    told = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Look(Policy):
        name: ClassVar[str] = "look"
        kinds = ("attention",)

        def acts(self, site):
            return frozenset({Effect.REPLACE})

        def around(self, call):
            return call.attention(lambda a: (told.append(a), a.default())[1])

    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    with torch.no_grad(), enable(model, Look()):
        model(**inputs)
    own = [a for a in told if not a.is_cross and a.q.shape[2] == a.k.shape[2]]
    assert own and all(a.layout is not None for a in own)
    fitting = [a.layout.at(a.q.shape[2]) for a in own]
    assert any(found is not None for found in fitting)
    text = next(found for found in fitting if found is not None).text
    where = FAMILIES[name]
    if where is None:
        assert text is None
    else:
        first = next(a for a, found in zip(own, fitting, strict=True) if found is not None)
        assert (text.start == 0) == (where == "first")
        assert text.stop - text.start + first.layout.visual == first.q.shape[2]


@pytest.mark.parametrize("name", ["t5", "umt5", "gpt_oss", "gemma2"])
def test_what_it_cannot_keep_is_computed_in_full(name):
    """A position bias, sinks, a soft cap: the plain answer, and the reason in the report."""
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    with torch.no_grad():
        plain = model(**inputs)[0]
        with enable(model, few()) as session:
            assert torch.equal(model(**inputs)[0], plain)
            assert session.report().to_dict()["never"]


def test_autocast_casts_as_the_model_does():
    model, inputs = TINY["llama"].build(), TINY["llama"].inputs(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(**inputs)[0]
        with enable(model, few(sparsity=1e-9)) as session:
            got = model(**inputs)[0]
            assert sum(session.skips.values())
    assert (got - plain).norm() <= 3e-2 * plain.norm()


def test_another_grid_of_as_many_tokens_has_a_plan_of_its_own():
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    wide, tall = (torch.randn(1, 4, 6, *size) for size in ((8, 12), (12, 8)))
    with torch.no_grad(), enable(model, few()) as session:
        alone = model(**inputs | {"hidden_states": tall})[0]
        session.reset()
        with session.run():
            model(**inputs | {"hidden_states": wide})
            together = model(**inputs | {"hidden_states": tall})[0]
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flux", {"grid": (40, 40), "text": "first"}),
        ("wan", {"grid": (32,)}),
        ("wan", {"grid": (1, 1, 1)}),
    ],
)
def test_a_grid_that_cannot_be_true_is_refused(name, settings):
    model, inputs = TINY[name].build(), TINY[name].inputs(1)
    with (
        torch.no_grad(),
        enable(model, few(**settings)),
        pytest.raises(UnsupportedModelError, match="where the layout is"),
    ):
        model(**inputs)


def test_flops_of_the_plain_model_are_those_without_the_policy():
    for name in ("llama", "wan", "flux"):
        model, inputs = TINY[name].build(), TINY[name].inputs(1)
        plain = []
        for policy in (DraftAttention.exact(), few(sparsity=0.5)):
            with torch.no_grad(), enable(model, policy) as session:
                model(**inputs)
                plain.append(session.report().to_dict()["totals"]["flops_plain"])
        assert plain[0] == pytest.approx(plain[1], rel=1e-6)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["quantile", "row"])
def test_the_density_is_the_one_asked_for(select):
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    with torch.no_grad(), enable(model, few(sparsity=0.75, select=select), audit=1) as session:
        model(**inputs)
        visits = [v for v in session.report().steps if v["action"] == "partly"]
    assert visits
    for visit in visits:
        assert visit["numbers"]["density"] == pytest.approx(0.25, abs=0.02)
        assert 0 < visit["numbers"]["mass_kept"] < 1
        assert visit["numbers"]["true_error"] > 0
        assert {"draft_ms", "select_ms", "reorder_ms", "kernel_ms"} <= visit["numbers"].keys()


def test_mass_keeps_its_share():
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    densities = []
    for mass in (0.3, 0.9):
        policy = few(mass=mass, select="mass")
        with torch.no_grad(), enable(model, policy) as session:
            model(**inputs)
            found = [v["numbers"].get("density") for v in session.report().steps]
        densities.append([d for d in found if d is not None])
    assert all(low < high < 1 for low, high in zip(*densities, strict=True))


def test_the_first_steps_and_layers_are_dense():
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    time = inputs.pop("timestep")
    policy = few(dense_steps=0.25, dense_blocks=1)
    with torch.no_grad(), enable(model, policy) as session, session.run(total=8):
        for step in range(8):
            model(**inputs, timestep=time * 0 + 1000 - step)
    done = session.report().steps
    sparse = {(v["step"], v["site"]) for v in done if v["action"] == "partly"}
    assert {step for step, _ in sparse} == set(range(2, 8))
    sites = [site.name for site in session.sites]
    assert sites[0] not in {site for _, site in sparse}
    reasons = {v["reason"] for v in done if v["action"] == "computed"}
    assert {"one of the first steps", "one of the first layers"} <= reasons


def test_a_share_of_unknown_steps_is_told():
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    with torch.no_grad(), enable(model, few(dense_steps=0.25)) as session:
        model(**inputs)
    assert any("session.run(total=" in note for note in session.notes)


def test_masks_that_are_more_than_padding_are_computed_in_full():
    model, inputs = TINY["llama"].build(), TINY["llama"].inputs(2)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    inputs = inputs | {"attention_mask": mask}
    with torch.no_grad():
        plain = model(**inputs)[0]
        with enable(model, few()) as session:
            assert torch.equal(model(**inputs)[0], plain)
            report = session.report().to_dict()
    assert "mask" in report["never"]


def test_decoding_is_dense_after_a_sparse_prefill():
    model, inputs = TINY["llama"].build(), TINY["llama"].inputs(1)
    with torch.no_grad(), enable(model, few(sparsity=0.5)) as session:
        model.generate(
            **inputs | {"use_cache": True}, min_new_tokens=4, max_new_tokens=4, do_sample=False
        )
        done = session.report().steps
    assert {v["action"] for v in done if v["step"] == 0} == {"partly"}
    assert {v["action"] for v in done if v["step"] > 0} == {"computed"}


def test_a_model_of_an_unknown_family_needs_a_grid():
    model, inputs = TINY["auraflow"].build(), TINY["auraflow"].inputs(2)
    with pytest.raises(UnsupportedModelError, match=r"grid=\(frames, height, width\)"):
        enable(model, few())
    with torch.no_grad():
        with enable(model, few(grid=(3, 5, 7))), pytest.raises(UnsupportedModelError) as error:
            model(**inputs)
        tokens = int(str(error.value).split("its attention has ")[1].split()[0])
        with enable(model, few(grid=(tokens // 4, 2, 2), text="last")) as session:
            model(**inputs)
            assert sum(session.skips.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, "0 <= sparsity < 1"),
        ({"mass": 0.9}, "select"),
        ({"select": "mass"}, "together with mass="),
        ({"mass": 1.5, "select": "mass"}, "0 < mass <= 1"),
        ({"pool": (0, 2)}, "positive sizes"),
        ({"grid": ()}, "positive sizes"),
        ({"text": "first"}, "grid="),
        ({"dense_steps": -1}, "dense_steps"),
        ({"dense_blocks": -1}, "dense_blocks"),
        ({"sinks": -1}, "sinks"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(SpecError, match=words):
        DraftAttention(**settings)


def test_one_axis_for_a_grid_is_refused():
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    with torch.no_grad(), enable(model, few(pool=(4,))), pytest.raises(SpecError, match="one axis"):
        model(**inputs)


# -- budgets ---------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0.06, 0.95))
def test_budgets_spend_the_mean_and_keep_no_less_than_equal_ones(seed, target):
    generator = torch.Generator().manual_seed(seed)
    density = torch.tensor(_budgets.GRID, dtype=torch.float64).expand(3, -1)
    power = torch.rand(3, 1, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    curves = {name: _budgets.Curve(density**power, density) for name in ("a", "b")}
    shares, kept = _budgets.allocate(curves, target)
    mean = torch.cat(list(shares.values())).mean().item()
    assert mean == pytest.approx(target, abs=1e-6)
    assert kept["mass_fitted"] >= kept["mass_equal"] - 1e-9


def test_fit_gives_each_head_its_density(tmp_path):
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    policy = few(sparsity=0.6)
    fitted = policy.fit(model, [inputs, inputs], progress=False, resume=str(tmp_path / "state"))
    assert isinstance(fitted.heads, Artifact)
    again = policy.fit(model, [inputs, inputs], progress=False, resume=str(tmp_path / "state"))
    assert again.heads == fitted.heads
    with pytest.raises(ArtifactError, match="was begun with"):
        few(sparsity=0.5).fit(model, [inputs], progress=False, resume=str(tmp_path / "state"))
    densities = torch.cat(list(fitted.heads.tensors.values()))
    assert densities.mean() == pytest.approx(0.4, abs=1e-3) and densities.std() > 0
    fitted.heads.save(tmp_path / "budgets.safetensors")
    loaded = DraftAttention(**SMALL, heads=Artifact.load(tmp_path / "budgets.safetensors"))
    with torch.no_grad(), enable(model, loaded) as session:
        model(**inputs)
        found = [v["numbers"].get("density") for v in session.report().steps]
    found = [d for d in found if d is not None]
    assert sum(found) / len(found) == pytest.approx(0.4, abs=0.03)
    with pytest.raises(ArtifactError):
        enable(TINY["dit"].build(), loaded)


@pytest.mark.parametrize("name", ["llama", "whisper", "flux", "hunyuan_video", "wan"])
def test_a_fitted_density_is_measured_as_sparsity_is(name):
    """Of the blocks that may be left out: neither text nor what no query may see counts."""
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    if name == "llama":
        draw = torch.Generator().manual_seed(0)
        inputs = {"input_ids": torch.randint(0, model.config.vocab_size, (2, 50), generator=draw)}

    def density(policy):
        with torch.no_grad(), enable(model, policy) as session:
            model(**inputs)
            found = [v["numbers"].get("density") for v in session.report().steps]
        return statistics.mean(d for d in found if d is not None)

    equal = few(sparsity=0.4)
    fitted = equal.fit(model, [inputs], progress=False)
    assert density(fitted) == pytest.approx(density(equal), abs=0.08)
    meta = fitted.heads.meta
    assert meta["mass_fitted"] >= meta["mass_equal"] - 1e-3


def test_a_density_out_of_reach_is_refused():
    model, inputs = TINY["llama"].build(), TINY["llama"].inputs(2)
    with pytest.raises(SpecError, match="out of reach"):
        few(sparsity=0.5).fit(model, [inputs], target=0.06, progress=False)


@pytest.mark.parametrize(("name", "count"), [("wan", 1), ("hunyuan_video", 1), ("pixart", 2)])
def test_dense_layers_are_layers_of_self_attention(name, count):
    """Neither attention to the text nor what is computed in full anyway is one of them, and a fit
    leaves them out."""
    model, inputs = TINY[name].build(), TINY[name].inputs(2)

    def sparse(policy):
        with torch.no_grad(), enable(model, policy) as session:
            model(**inputs)
            return [v["site"] for v in session.report().steps if v["action"] == "partly"]

    every = sparse(few(sparsity=0.5))
    some = few(sparsity=0.5, dense_blocks=count)
    assert sparse(some) == every[count:]
    if every[count:]:
        fitted = some.fit(model, [inputs], progress=False)
        assert set(fitted.heads.tensors) == set(every[count:])


def test_a_visit_with_several_attentions_tells_of_all():
    """Mochi attends a prompt at a time."""
    model, inputs = TINY["mochi"].build(), TINY["mochi"].inputs(2)
    times = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Heard(DraftAttention):
        def _attend(self, call, a, told):
            out = super()._attend(call, a, told)
            times.append(told[-1]["kernel_ms"])
            return out

    with torch.no_grad(), enable(model, Heard(**SMALL, sparsity=0.5)) as session:
        model(**inputs)
        done = [v["numbers"] for v in session.report().steps if v["action"] == "partly"]
    assert len(times) == 2 * len(done)
    assert sum(v["kernel_ms"] for v in done) == pytest.approx(sum(times))
    assert all(0 < v["density"] < 1 for v in done)


def test_mass_is_a_mean_over_tokens_where_blocks_are_ragged():
    layout = TokenLayout(1, 4, 6, text=slice(24, 31))
    plan = Plan.of(layout, 31, torch.device("cpu"), pool=(2, 2), rule="row", sinks=0, causal=False)
    q, k = torch.randn(2, 1, 2, 31, 8, generator=torch.Generator().manual_seed(0))
    q, k = plan.reorder(q), plan.reorder(k)
    mask = plan.selection.choose(plan.draft(q, k, 0.35), 0.4)
    shares = (q @ k.mT * 0.35).softmax(-1)
    row = torch.arange(31) // plan.block
    wanted = (shares * mask[..., row, :][..., row]).sum(-1).mean(-1)
    got = plan.kept(attention_mass(q, k, plan.block, scale=0.35), mask)
    assert torch.allclose(got, wanted, atol=1e-5)


# -- laws of the map -------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from(["quantile", "row", "mass"]))
def test_the_mass_kept_grows_with_the_density(seed, rule):
    q, k = torch.randn(2, 1, 2, 96, 8, generator=torch.Generator().manual_seed(seed)) * 2
    mass = attention_mass(q, k, 16)
    kept = [
        (mass * select_blocks(mass, share, rule=rule, diagonal=True)).sum(-1).mean().item()
        for share in (0.1, 0.3, 0.5, 0.8, 1.0)
    ]
    assert kept == sorted(kept) and kept[-1] == pytest.approx(1.0, abs=1e-5)


def test_it_says_which_kernel_it_lacks(monkeypatch):
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    with torch.no_grad(), enable(model, few()) as session:  # blocks of 4 tokens
        model(**inputs)
    assert any("without its fast kernel" in note for note in session.notes)
    assert FALLBACKS


def test_lazy_steps_leave_out_sparse_attention():
    """Whole steps are left out; the attention of the others is sparse."""
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(1)
    time = inputs.pop("timestep")
    policies = [LazyStep(criterion="cadence", every=2, warmup=1, cooldown=0), few()]
    with torch.no_grad(), enable(model, policies) as session:
        for step in range(6):
            model(**inputs, timestep=time * 0 + 1000 - step)
        totals = session.report().to_dict()["totals"]
    assert totals["skipped"] and totals["partly"]
    assert 0 < totals["flops_saved"] < totals["flops_plain"]


def test_a_policy_that_did_nothing_is_named_where_another_skipped():
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(2)
    stay = LazyStep(scope="stack", criterion="change", threshold=0.0)
    with torch.no_grad(), enable(model, [stay, few(sparsity=0.5)]) as session:
        for _ in range(3):
            model(**inputs)
        data = session.report().to_dict()
    assert data["never"] is None and data["idle"] == [str(stay)]
    assert f"{stay} skipped nothing" in str(session.report())


def test_text_without_its_padding_is_joint_all_the_same():
    """Mochi drops padded text a row, before its attention."""
    model, inputs = TINY["mochi"].build(), TINY["mochi"].inputs(2)
    mask = inputs["encoder_attention_mask"].clone()
    mask[:, 4:] = 0
    mask[1, 2:] = 0
    told = []
    with torch.no_grad(), enable(model, few(sparsity=0.5)) as session:
        model(**inputs | {"encoder_attention_mask": mask})
        told = [s for s in session.report().steps if s["action"] == "partly"]
    sites = [site for site in session.sites if site.kind == "attention"]
    assert len(told) == len(sites)


def test_what_cannot_be_seen_is_not_saved():
    """Causal: all blocks that are visible are half of them."""
    model, inputs = TINY["llama"].build(), TINY["llama"].inputs(2)
    with torch.no_grad(), enable(model, few(mass=1.0, select="mass", pool=(2,))) as session:
        model(**inputs)
        steps = session.report().steps
    assert [s["numbers"]["density"] for s in steps] == pytest.approx([1.0] * len(steps))


@pytest.mark.parametrize(("share", "total", "dense"), [(0.14, 50, 7), (0.28, 25, 7), (0.3, 5, 2)])
def test_a_share_of_the_steps_is_rounded_up_once(share, total, dense):
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(1)
    inputs["timestep"] = torch.tensor([0])
    with torch.no_grad(), enable(model, few(sparsity=0.5, dense_steps=share)) as session:
        with session.run(total=total):
            for t in range(dense + 1):
                model(**inputs | {"timestep": torch.tensor([total - t])})
        steps = session.report().steps
    assert {s["step"] for s in steps if s["action"] == "computed"} == set(range(dense))


@pytest.mark.parametrize(
    ("shares", "settings", "words"),
    [
        ([0.5, float("nan")], {}, "no numbers from 0 to 1"),
        ([0.5, 2.0], {}, "no numbers from 0 to 1"),
        ([0.5], {}, "1 densities for the 5 heads"),
        ([0.5, 0.5], {"pool": [1, 1, 2]}, "were fitted with pool"),
        ([0.5, 0.5], {"select": "row"}, "were fitted with select"),
    ],
)
def test_densities_that_cannot_be_are_refused(shares, settings, words):
    model, inputs = TINY["dit"].build(), TINY["dit"].inputs(1)
    with enable(model, few()) as session:
        names = [s.name for s in session.sites if s.kind == "attention"]
    tensors = {name: torch.tensor(shares) for name in names}
    made = Artifact.create(tensors, policy="draft_attention", model=model, settings=settings)

    def run():
        with torch.no_grad(), enable(model, few(heads=made)):
            model(**inputs)

    with pytest.raises(ArtifactError, match=words):
        run()
