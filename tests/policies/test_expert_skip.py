"""ExpertSkip: its rules against a slow oracle (test_moe_families.py: what it makes of models)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_models import MOE
from tiny_models import TINY

from accelerate_hooks import ArtifactError, ExpertSkip, SpecError, enable
from accelerate_hooks.artifact import Artifact
from accelerate_hooks.registry import patch_for


@st.composite
def routers(draw):
    tokens, k = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weights = (torch.randn(tokens, k, generator=generator) * draw(st.floats(0, 3))).softmax(-1)
    return weights.sort(-1, descending=True).values


def by_hand(policy, row):
    """One token at a time, from the docstring."""
    k, total = len(row), sum(row)
    kept = 0
    held = 0.0
    for s, w in enumerate(row):
        rules = [policy.top_k is None or s < policy.top_k]
        rules.append(policy.ratio is None or w >= policy.ratio * row[0])
        rules.append(policy.mass in (None, 1.0) or held / total < policy.mass)
        rules.append(policy.floor is None or w >= policy.floor)
        if not all(rules):
            break
        kept, held = s + 1, held + w
    kept = max(kept, min(policy.min_experts, k))
    bound = policy.max_dropped_mass
    while bound is not None and kept < k and 1 - sum(row[:kept]) / total > bound + 1e-6:
        kept += 1
    return kept


@given(routers(), st.data())
def test_what_is_kept_is_what_the_rules_say(weights, data):
    none = st.none()
    policy = ExpertSkip(
        top_k=data.draw(none | st.integers(1, 8)),
        ratio=data.draw(none | st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        mass=data.draw(none | st.sampled_from([0.35, 0.8, 1.0])),
        floor=data.draw(none | st.sampled_from([0.0, 0.1, 0.4])),
        min_experts=data.draw(st.integers(1, 4)),
        max_dropped_mass=data.draw(none | st.sampled_from([0.0, 0.15, 0.5])),
    )
    kept = policy.keep(weights, policy.top_k).sum(-1).tolist()
    for got, row in zip(kept, weights.tolist(), strict=True):
        wanted = {by_hand(policy, [w * (1 + e) for w in row]) for e in (0,)}
        near = {by_hand(policy, row), *wanted}
        assert got in near or _on_the_edge(policy, row, got)


def _on_the_edge(policy, row, got):
    """Sums in another order differ by a bit, where a rule's bound is met exactly."""
    shifted = [
        by_hand(ExpertSkip(**(policy.settings() | {name: value})), row)
        for name in ("mass", "max_dropped_mass", "ratio")
        if getattr(policy, name) is not None
        for value in (
            min(1.0, getattr(policy, name) * (1 + 1e-5)),
            getattr(policy, name) * (1 - 1e-5),
        )
        if not (name == "mass" and value <= 0)
    ]
    return got in shifted


@given(routers(), st.floats(0, 1))
def test_no_token_loses_more_than_the_bound(weights, bound):
    policy = ExpertSkip(ratio=0.9, max_dropped_mass=bound)
    kept = policy.keep(weights, None)
    lost = 1 - (weights * kept).sum(-1) / weights.sum(-1)
    assert (lost <= bound + 1e-5).all()


@given(routers())
def test_rules_that_keep_all_keep_all(weights):
    k = weights.shape[1]
    for policy in (
        ExpertSkip(ratio=0.0),
        ExpertSkip(mass=1.0),
        ExpertSkip(top_k=k),
        ExpertSkip(floor=0.0),
        ExpertSkip(ratio=1.0, max_dropped_mass=0.0),
    ):
        assert policy.keep(weights, policy.top_k).sum() >= (weights > 1e-6).sum()


def test_generation_with_a_cache_and_padding():
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    inputs = inputs | {"use_cache": True}
    for policy in (ExpertSkip(mass=0.7), ExpertSkip(top_k=2)):
        with torch.no_grad(), enable(model, policy) as session:
            out = model.generate(**inputs, min_new_tokens=4, max_new_tokens=4, do_sample=False)
            assert out.shape[1] == inputs["input_ids"].shape[1] + 4
            actions = {v["step"]: v["action"] for v in session.report().steps}
        assert set(actions.values()) == {"partly"} and len(actions) == 4


def test_the_report_tells_the_dropped_mass():
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    with torch.no_grad(), enable(model, ExpertSkip(ratio=0.8, max_dropped_mass=0.4)) as session:
        model(**inputs)
        visits = [v for v in session.report().steps if v["action"] == "partly"]
    assert visits
    for visit in visits:
        numbers = visit["numbers"]
        assert 0 < numbers["dropped_mass"] <= numbers["dropped_most"] <= 0.4 + 1e-5
        assert 1 <= numbers["experts"] < 4


def test_what_was_dropped_is_told_more_finely_than_the_weights_are():
    """In bfloat16 a loss just under the bound was rounded to one above it."""
    model, inputs = TINY["qwen3_moe"].build().bfloat16(), TINY["qwen3_moe"].inputs(2)
    lost = []
    for bound in (0.05, 0.13, 0.3):
        with (
            torch.no_grad(),
            enable(model, ExpertSkip(ratio=0.9, max_dropped_mass=bound)) as session,
        ):
            model(**inputs)
            told = [v["numbers"].get("dropped_most", 0.0) for v in session.report().steps]
        assert max(told) <= bound + 2e-6
        lost += told
    assert max(lost) > 0


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_half_the_experts_are_half_of_the_work(experts):
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    model.set_experts_implementation(experts)
    with torch.no_grad(), enable(model, ExpertSkip(top_k=2)) as session:
        model(**inputs)
        visits = [v["numbers"] for v in session.report().steps]
    assert [v["share_left_out"] for v in visits] == [0.5] * 4


@torch.no_grad()
def test_embeddings_are_counted_like_tokens():
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    tokens = inputs.pop("input_ids")
    embedded = {"inputs_embeds": model.get_input_embeddings()(tokens)}
    found = []
    for given_ in ({"input_ids": tokens}, embedded):
        with enable(model, ExpertSkip(mass=0.6)) as session:
            model(**inputs, **given_)
            report = session.report().to_dict()
        found.append([(v["action"], v["numbers"]) for v in report["steps"]])
        totals = report["totals"]
        assert totals["uncounted_forwards"] == 0 and totals["flops_saved"] > 0
    assert found[0] == found[1] and any(n["share_left_out"] > 0.2 for _, n in found[0])


@torch.no_grad()
def test_shares_are_told_of_more_lengths_than_are_counted():
    model, ids = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(1)["input_ids"].repeat(1, 8)
    with enable(model, ExpertSkip(top_k=2)) as session:
        for tokens in range(2, 32):
            model(ids[:, :tokens])
        visits = [v["numbers"] for v in session.report().steps]
    assert len(visits) == 4 * 30 and {v["share_left_out"] for v in visits} == {0.5}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_request_that_is_not_finite_spoils_no_other(bad):
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    with enable(model, ExpertSkip(mass=0.6)):
        wanted = model(**inputs).logits
    spoiled = model.get_input_embeddings()(inputs["input_ids"])
    spoiled[0, 2] = bad
    with enable(model, ExpertSkip(mass=0.6)) as session:
        model(inputs_embeds=spoiled, attention_mask=inputs["attention_mask"])
        assert torch.equal(model(**inputs).logits, wanted)
        assert not any("does not know" in note for note in session.report().to_dict()["notes"])


def test_a_number_a_layer():
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    with torch.no_grad(), enable(model, ExpertSkip(top_k=(4, 1, 1, 1))) as session:
        model(**inputs)
        actions = [v["action"] for v in session.report().steps]
    assert actions[0] == "computed" and set(actions[1:]) == {"partly"}


def test_numbers_of_layers_are_the_layers_whatever_only_leaves_out():
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    mixtures = [s.name for s in patch_for(model).sites(model) if s.kind == "experts"]
    assert len(mixtures) == 4
    policy = ExpertSkip(top_k=(4, 4, 1, 4))
    for name, wanted in zip(mixtures, ("computed", "computed", "partly", "computed"), strict=True):
        with torch.no_grad(), enable(model, policy, only=name, strict=False) as session:
            model(**inputs)
            actions = {v["action"] for v in session.report().steps}
        assert actions == {wanted}


@pytest.mark.parametrize("rule", [{"top_k": (2, 2)}, {"mass": (0.5,) * 5}, {"ratio": (0.5,)}])
def test_numbers_for_another_number_of_layers_are_refused(rule):
    with pytest.raises(SpecError, match=r"numbers, Qwen3MoeForCausalLM 4 mixtures"):
        enable(TINY["qwen3_moe"].build(), ExpertSkip(**rule))


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v2", "muse_spark"]
)
@pytest.mark.parametrize("rule", [{"top_k": 1}, {"ratio": 0.95}], ids=str)
def test_how_a_token_is_weighed_does_not_depend_on_others(name, rule):
    """Some routers give all tokens weights of one sum, some do not, and some of a sum other than 1:
    one token alone, the same token twice and garbage tell nothing of it."""
    model = MOE[name].build()
    x = MOE[name].inputs(2)["input_ids"]

    def first(ids, *before):
        with torch.no_grad(), enable(model, ExpertSkip(**rule), strict=False):
            for other in before:
                model(other)
            return model(ids).logits[:, 0]

    def garbage():
        embeddings = model.get_input_embeddings()(x)
        with torch.no_grad(), enable(model, ExpertSkip(**rule), strict=False):
            model(inputs_embeds=embeddings * torch.nan)
            return model(x).logits[:, 0]

    wanted = first(x)
    plain = model(x).logits[:, 0]
    assert (wanted - plain).norm() > 1e-6 * plain.norm()  # something was left out
    for got in (first(x[:, :1]), first(x, x[:, :1]), first(x, x[:1, :1].expand(1, 9)), garbage()):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 0}, "at least 1"),
        ({"top_k": ()}, "one a layer"),
        ({"ratio": 1.5}, "0 to 1"),
        ({"mass": 0.0}, "0 < mass"),
        ({"floor": -1.0}, "at least 0"),
        ({"min_experts": 0}, "at least 1"),
        ({"max_dropped_mass": 2.0}, "0 to 1"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(SpecError, match=words):
        ExpertSkip(**settings)


# -- what stands in for an expert ------------------------------------------------------------------


def seen_experts(model, inputs):
    """What every mixture is given and gives, and each of its experts at weight 1."""
    found = []

    def hook(module, args, out):
        x, indices, weights = args[:3]
        one = torch.ones_like(weights[:, :1])
        plain = type(module).forward
        ys = [plain(module, x, indices[:, [s]], one) for s in range(indices.shape[1])]
        found.append((x, indices, weights, torch.stack(ys, 1), out))

    experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
    handles = [m.register_forward_hook(hook) for m in experts]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("name", "rule"),
    [("qwen3_moe", {"mass": 0.5}), ("mixtral", {"top_k": 1}), ("deepseek_v3", {"ratio": 0.6})],
)
def test_the_mean_of_an_expert_stands_in_for_it(name, rule):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    plain = seen_experts(model, inputs)
    count = len(plain)
    top = plain[0][1].shape[1]
    fitted = ExpertSkip(**rule).fit(model, [inputs], target=1 + (top - 1) / 2, progress=False)
    for i, (_, indices, _, ys, _) in enumerate(plain):
        mean = fitted.artifact.tensors[f"mean.{i}"].float()
        for e in indices.unique().tolist():
            wanted = ys[indices == e].mean(0)
            assert torch.allclose(mean[e], wanted, rtol=2e-2, atol=1e-2 * wanted.abs().max().item())
    dropped = 0
    with enable(model, fitted):
        seen = seen_experts(model, inputs)
    for i, (_, indices, weights, ys, out) in enumerate(seen):
        order = weights.argsort(dim=-1, descending=True, stable=True)
        limit = (fitted.top_k or (None,) * count)[i]
        kept = fitted.keep(weights.gather(1, order), limit, i).gather(1, order.argsort(-1))
        means = fitted.artifact.tensors[f"mean.{i}"].to(ys)[indices]
        parts = torch.where(kept.unsqueeze(-1), ys, means) * weights.unsqueeze(-1)
        assert torch.allclose(out, parts.sum(1).to(out), rtol=1e-4, atol=1e-4)
        dropped += int((~kept).sum())
    assert dropped


@pytest.mark.parametrize("rule", [{"mass": 0.6}, {"top_k": 2}], ids=str)
def test_the_means_follow_the_model_to_another_dtype(rule):
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    fitted = ExpertSkip(mass=0.5).fit(model, inputs, target=2.0, progress=False)
    policy = ExpertSkip(**rule, artifact=fitted.artifact)
    with torch.no_grad(), enable(model, policy):
        model(**inputs)
        model.bfloat16()
        got = model(**inputs).logits
    with torch.no_grad(), enable(model, policy):
        assert torch.equal(model(**inputs).logits, got)


def test_a_look_at_the_router_is_not_counted_by_it():
    """Some count in buffers how often each expert is asked."""
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    gate = model.model.layers[0].mlp.gate
    gate.register_buffer("asked", torch.zeros((), dtype=torch.int64))
    forward = type(gate).forward

    class Counting(type(gate)):
        def forward(self, x):
            self.asked += len(x)
            self.asked = self.asked + 0
            return forward(self, x)

    gate.__class__ = Counting
    with torch.no_grad(), enable(model, ExpertSkip(top_k=2)):
        model(**inputs)
    assert gate.asked == inputs["input_ids"].numel()


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: {"thresholds": t["thresholds"] * torch.nan}, "out of range"),
    (lambda t: {"mean.1": t["mean.1"][:2]}, "mean outputs"),
    (lambda t: {"mean.1": t["mean.1"] * torch.nan}, "not all numbers"),
])  # fmt: skip
def test_artifacts_are_checked_like_settings(change, words):
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    fitted = ExpertSkip(mass=0.5).fit(model, inputs, target=2.0, progress=False).artifact
    with pytest.raises((ArtifactError, SpecError), match=words), torch.no_grad():
        wrong = replace(fitted, tensors=fitted.tensors | change(fitted.tensors))
        with enable(model, ExpertSkip(artifact=wrong)):
            model(**inputs)


def test_nothing_stands_in_where_all_are_kept():
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    fitted = ExpertSkip(mass=0.5).fit(model, [inputs], target=1.5, progress=False)
    with torch.no_grad():
        plain = model(**inputs).logits
        with enable(model, replace(fitted, mass=1.0)):
            assert torch.equal(model(**inputs).logits, plain)


def test_means_of_another_width_are_refused():
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    fitted = ExpertSkip(mass=0.5).fit(model, [inputs], target=1.5, progress=False)
    tensors = {n: t[:, :-1] if n.startswith("mean.") else t
               for n, t in fitted.artifact.tensors.items()}  # fmt: skip
    broken = replace(fitted, artifact=Artifact(tensors, fitted.artifact.meta))

    def run():
        with torch.no_grad(), enable(model, broken):
            model(**inputs)

    with pytest.raises(ArtifactError, match="fit again"):
        run()
