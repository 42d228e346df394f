"""ExpertSkip with fewer experts in the model: hidden, taken out, merged, searched."""

import copy
import itertools
import pickle
from collections import UserDict
from dataclasses import replace

import contract
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import MOE
from tiny_models import TINY
from torch import nn
from transformers import DeepseekV3ForCausalLM

from accelerate_hooks import ExpertSkip, SpecError, active, enable
from accelerate_hooks.artifact import Artifact
from accelerate_hooks.errors import ArtifactError, PolicyConflictError, UnsupportedModelError
from accelerate_hooks.policies._evolving import evolve
from accelerate_hooks.policies._hull import split
from accelerate_hooks.policies._pruning import aimer, importance, mixtures, nearest, survivors
from accelerate_hooks.policies._surgery import Removed, mixed
from accelerate_hooks.resume import Resume
from accelerate_hooks.session import InertWarning
from accelerate_hooks.spec import parse

FAMILIES = (
    "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "qwen2_moe", "phimoe",
    "deepseek_v2", "glm4_moe", "hunyuan_moe", "ernie4_5_moe",
)  # fmt: skip


def tiny(name="qwen3_moe"):
    return TINY[name].build(), TINY[name].inputs(2)


def run(model, inputs, policy=None):
    with torch.no_grad():
        if policy is None:
            return model(**inputs).logits
        with enable(model, policy):
            return model(**inputs).logits


# -- hidden and taken out --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_hiding_and_taking_out_are_the_same_and_leave_no_trace(name):
    model, inputs = tiny(name)
    plain, before = run(model, inputs), dict(model.named_parameters())
    hidden = run(model, inputs, ExpertSkip(prune=0.25))
    assert not torch.equal(hidden, plain)
    assert torch.equal(run(model, inputs, ExpertSkip(prune=0.25, free_memory=True)), hidden)
    assert torch.equal(run(model, inputs), plain)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe"])
def test_hiding_is_a_model_without_these_experts(name):
    """In float64, against a smaller model of the class that was given the rows that are left."""
    model, inputs = tiny(name)
    model.double().set_experts_implementation("eager")  # the only one in float64
    with enable(model, ExpertSkip(prune=0.4)) as session:
        layers = mixtures(session.sites)
        kept = [(~session.record(x.router).facts["known", 0, "plan"].hidden) for x in layers]
    config = copy.deepcopy(model.config)
    key = "num_local_experts" if hasattr(config, "num_local_experts") else "num_experts"
    setattr(config, key, int(kept[0].sum()))
    small = type(model)(config).double().eval()
    small.set_experts_implementation("eager")
    state = model.state_dict()
    for layer, keep in zip(layers, kept, strict=True):
        for site in (layer.router, layer.experts):
            for n in dict(site.module.named_parameters()):
                state[f"{site.path}.{n}"] = state[f"{site.path}.{n}"][keep]
    small.load_state_dict(state)
    wanted = run(small, inputs)
    got = run(model, inputs, ExpertSkip(prune=0.4))
    assert (got - wanted).norm() <= 1e-12 * wanted.norm()


@given(st.permutations(range(6)))
@settings(max_examples=8)
def test_the_numbers_of_the_experts_do_not_matter(order):
    model, inputs = tiny()
    wanted = run(model, inputs, ExpertSkip(prune=0.34))
    with enable(model, ExpertSkip(prune=0.34)) as session:
        layers = mixtures(session.sites)
    with torch.no_grad():
        for layer in layers:
            for p in (*layer.router.module.parameters(), *layer.experts.module.parameters()):
                p.copy_(p[list(order)])
    got = run(model, inputs, ExpertSkip(prune=0.34))
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_rules_work_on_what_is_left():
    model, inputs = tiny()
    for rule in ({"top_k": 2}, {"ratio": 0.8}, {"mass": 0.6}):
        hidden = run(model, inputs, ExpertSkip(prune=0.25, **rule))
        gone = run(model, inputs, ExpertSkip(prune=0.25, free_memory=True, **rule))
        assert (hidden - gone).norm() <= 1e-5 * hidden.norm()
        assert (hidden - run(model, inputs, ExpertSkip(prune=0.25))).norm() > 0


def test_copies_pickles_and_files_hold_all_experts():
    model, inputs = tiny()
    plain = run(model, inputs)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad(), enable(model, ExpertSkip(prune=0.25, free_memory=True)) as session:
        run_pruned = model(**inputs).logits
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[n], before[n]) for n in before)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**inputs).logits, plain)
        assert torch.equal(model(**inputs).logits, run_pruned)
        assert "MB of parameters less" in str(session.report())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("how", [{"free_memory": True}, {"merge": True}], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_while_experts_are_out_reach_them(how, assign):
    model, inputs = tiny()
    other, _ = tiny()
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p.mul_(1.0 + 0.01 * (i % 7))
    policy = ExpertSkip(prune=0.25, **how)
    wanted, plain = run(other, inputs, policy), run(other, inputs)
    with enable(model, policy), torch.no_grad():
        model(**inputs)
        model.load_state_dict(other.state_dict(), assign=assign)
        got = model(**inputs).logits
    assert torch.equal(got, wanted)
    assert torch.equal(run(model, inputs), plain)


def test_a_change_of_dtype_while_experts_are_out_reaches_them():
    model, inputs = tiny()
    with enable(model, ExpertSkip(prune=0.25, free_memory=True)):
        model.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    run(model, inputs)


USES = (
    copy.deepcopy, pickle.dumps, lambda m: m.state_dict(),
    *(lambda m, p=p: enable(m, p) for p in (
        ExpertSkip(ratio=0.5), ExpertSkip(prune=0.1), ExpertSkip(prune=0.1, free_memory=True),
    )),
)  # fmt: skip


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("at", [1, 2, 4, 7])
def test_a_shrinking_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch, merge, at):
    model, inputs = tiny()
    plain, before = run(model, inputs), dict(model.named_parameters())
    left, times = Removed.left, itertools.count(1)

    def full(self, parameter):
        if next(times) == at:
            raise torch.OutOfMemoryError("no memory")
        return left(self, parameter)

    monkeypatch.setattr(Removed, "left", full)
    with pytest.raises(torch.OutOfMemoryError):
        enable(model, ExpertSkip(prune=0.25, free_memory=True, merge=merge))
    assert torch.equal(run(model, inputs), plain)
    assert all(p is before[n] for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gemma4", "diffusion_gemma"])
def test_no_more_is_taken_than_a_token_asks_wherever_its_number_is_said(name):
    model = MOE[name].build()
    with enable(model, ExpertSkip(prune=0.1)) as session:
        layer = mixtures(session.sites)[0]
    assert layer.top_k == model.config.get_text_config().top_k_experts
    too_many = (layer.count - layer.top_k + 1) / layer.count
    with pytest.raises(SpecError, match=r"take fewer|asks"):
        enable(model, ExpertSkip(prune=too_many + 1e-6))


def test_a_wrapped_router_is_pruned_all_the_same():
    """PEFT's modules_to_save, or a wrapper that logs."""

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model, inputs = tiny()
    wanted = run(model, inputs, ExpertSkip(prune=0.25, criterion="aimer"))
    for layer in model.model.layers:
        layer.mlp.gate = Wrapped(layer.mlp.gate)
    assert torch.equal(run(model, inputs, ExpertSkip(prune=0.25, criterion="aimer")), wanted)


@pytest.mark.parametrize(
    ("only", "words"), [("*.gate", "no experts sites"), ("*.experts", "name the router too")]
)
def test_pruning_wants_both_experts_and_their_router(only, words):
    with pytest.raises(UnsupportedModelError, match=words):
        enable(tiny()[0], ExpertSkip(prune=0.25), only=only)


def test_what_is_deleted_is_told():
    model, inputs = tiny()
    policy = ExpertSkip(prune=0.25, free_memory=True, irreversible=True)
    with torch.no_grad(), enable(model, policy) as session:
        wanted = run(*tiny(), ExpertSkip(prune=0.25))
        assert torch.equal(model(**inputs).logits, wanted)
        assert "deleted" in str(session.report())
        for use in USES[:3]:
            with pytest.raises(UnsupportedModelError, match="irreversible=True has deleted"):
                use(model)
    weights = tiny()[0].state_dict()
    for use in (*USES, lambda m: run(m, inputs), lambda m: m.load_state_dict(weights)):
        with pytest.raises(UnsupportedModelError, match="load the model again"):
            use(model)


@pytest.mark.parametrize("policy", [
    ExpertSkip(prune=0.25, free_memory=True),
    ExpertSkip(prune=0.25, merge=True),
    ExpertSkip(prune=0.25, free_memory=True, irreversible=True),
], ids=str)  # fmt: skip
def test_what_is_gone_is_gone_from_every_forward(policy, recwarn):
    """With gradients, in training mode, paused, of a part of the model, in what the rules leave."""
    model, inputs = tiny()
    part, seen = model.model.layers[0].mlp, []
    handle = part.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with enable(model, policy) as session:
        with torch.no_grad():
            wanted = model(**inputs).logits
            handle.remove()
            assert torch.equal(part(seen[0][0]), seen[0][1])
            with session.paused():
                assert torch.equal(model(**inputs).logits, wanted)
        assert torch.equal(model(**inputs).logits, wanted)
        assert torch.equal(model.train()(**inputs).logits, wanted)
        model.eval()
        assert "while paused, too" in " ".join(str(session.report()).split())
    assert not recwarn.list
    if policy.irreversible:
        return
    with enable(model, replace(policy, mass=0.5)), pytest.warns(InertWarning):
        assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("free", list(itertools.product([False, True], repeat=2)))
def test_a_mixture_is_pruned_once(free):
    model, inputs = tiny()
    plain = run(model, inputs)
    with pytest.raises(PolicyConflictError, match="both replace"):
        enable(model, [ExpertSkip(prune=0.25, free_memory=f) for f in free])
    assert active(model) is None and torch.equal(run(model, inputs), plain)


def test_experts_that_two_layers_share_are_not_taken_out():
    model, inputs = tiny()
    layers = model.model.layers
    layers[1].mlp.experts = layers[0].mlp.experts
    plain, before = run(model, inputs), dict(model.named_parameters())
    with pytest.raises(UnsupportedModelError, match="several layers share"):
        enable(model, ExpertSkip(prune=0.25, free_memory=True))
    assert torch.equal(run(model, inputs), plain)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)


def test_a_token_is_always_given_as_many_experts_as_it_asks():
    model, _ = tiny()
    for prune in (0.5, (3, 0, 0, 0)):
        with pytest.raises(SpecError, match="take at most 2"):
            enable(model, ExpertSkip(prune=prune))
    with pytest.raises(SpecError, match="has 2 numbers, this model 4"):
        enable(model, ExpertSkip(prune=(1, 1)))


def grouped():
    """Two of four groups of two experts, and three of these four experts, for each token."""
    config = copy.deepcopy(tiny("deepseek_v3")[0].config)
    config.n_routed_experts = config.num_local_experts = 8
    config.n_group, config.topk_group, config.num_experts_per_tok = 4, 2, 3
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).eval()


def test_groups_of_experts_keep_enough_whatever_the_prompt():
    model = grouped()
    with enable(model, ExpertSkip(prune=0.0)) as session:
        layers = mixtures(session.sites)
    every = torch.arange(1, model.config.vocab_size).unsqueeze(1)
    ran = 0
    for number in range(6):
        policy = ExpertSkip(prune=(number,) + (0,) * (len(layers) - 1))
        kept = survivors(importance(layers[0]), number)
        least = sorted((kept // 2).bincount(minlength=4).tolist())[:2]
        if sum(least) >= 3:
            run(model, {"input_ids": every}, policy)
            ran += 1
        else:
            with pytest.raises(SpecError, match="groups"):
                enable(model, policy)
    assert 1 < ran < 5
    fit = ExpertSkip(prune=0.1, criterion="frequency").fit
    run(model, {"input_ids": every}, fit(model, every, target=0.13, generations=1, progress=False))


def test_the_router_gives_its_logits_for_all():
    model, inputs = tiny()
    with torch.no_grad(), enable(model, ExpertSkip(prune=0.25, free_memory=True)):
        out = model(**inputs, output_router_logits=True)
    assert all(x.shape[-1] == 6 for x in out.router_logits) and torch.isfinite(out.aux_loss)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prune": 1.0}, "0 <= prune < 1"),
        ({"prune": (-1, 0)}, "0 <= prune < 1"),
        ({"merge": True}, "a share to prune"),
        ({"free_memory": True}, "a share to prune"),
        ({"prune": 0.5, "irreversible": True}, "free_memory=True"),
        ({"prune": 0.5, "criterion": "magnitude"}, "criterion"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(SpecError, match=words):
        ExpertSkip(**settings)


# -- criteria --------------------------------------------------------------------------------------


def test_aimer_is_its_formula():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    parts = [x[:10], x[10:].reshape(50, 18)]
    wanted = x.double().abs().mean() / x.double().square().mean().sqrt()
    assert torch.isclose(aimer(parts), wanted, rtol=1e-6)
    assert torch.isclose(aimer([x * 7]), aimer([x]), rtol=1e-6)
    assert aimer([torch.ones(5, 5)]) == 1 and aimer([torch.zeros(5, 5)]) == 0


def test_what_data_shows_is_what_a_slow_count_shows():
    model, inputs = tiny()
    fitted = ExpertSkip(prune=0.25, criterion="reap").fit(model, [inputs], progress=False)
    path, module = next((n, m) for n, m in model.named_modules() if n.endswith(".experts"))
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args))
    run(model, inputs)
    handle.remove()
    hidden, indices, weights = seen[0]
    asked, weight, norm, both = torch.zeros(4, 6, dtype=torch.float64)
    for t, s in itertools.product(range(len(hidden)), range(indices.shape[1])):
        e, one = int(indices[t, s]), torch.ones(1, 1)
        with torch.no_grad():
            y = module(hidden[t : t + 1], indices[t : t + 1, s : s + 1], one).double().norm()
        asked[e] += 1
        weight[e] += weights[t, s].double()
        norm[e] += y
        both[e] += weights[t, s] * y
    wanted = {
        "frequency": asked / len(hidden),
        "router_weight": weight / len(hidden),
        "activation_norm": norm / len(hidden),
        "reap": both / asked.clamp(min=1),
    }
    assert path in fitted.artifact.meta["layers"][0]
    for name, values in wanted.items():
        assert torch.allclose(fitted.artifact.tensors[f"{name}.0"], values, rtol=1e-4), name


def test_what_was_measured_is_the_layers_whatever_only_leaves_out():
    model, inputs = tiny()
    fitted = ExpertSkip(prune=(1, 0, 1, 2), criterion="frequency").fit(
        model, inputs, progress=False
    )

    def hidden(**choice):
        with enable(model, fitted, **choice) as session:
            return {
                layer.router.name: session.record(layer.router).facts["known", 0, "plan"].hidden
                for layer in mixtures(session.sites)
                if session.policies_at(layer.router)
            }

    whole = hidden()
    assert [int(mask.sum()) for mask in whole.values()] == [1, 0, 1, 2]
    last = list(whole)[-1]
    some = hidden(only=f"{last.rpartition('.')[0]}*")
    assert list(some) == [last] and torch.equal(some[last], whole[last])


def test_criteria_that_need_data_say_so():
    model, _ = tiny()
    with pytest.raises(ArtifactError, match="fit\\(model, data\\)"):
        enable(model, ExpertSkip(prune=0.25, criterion="reap"))


# -- merging ---------------------------------------------------------------------------------------


def test_merging_leaves_the_better_half_untouched():
    model, _ = tiny()
    with enable(model, ExpertSkip(prune=0.0)) as session:
        layer = mixtures(session.sites)[0]
    scores, kept = torch.tensor([5.0, 1, 2, 6, 3, 4]), torch.tensor([0, 3, 4, 5])
    matrix = nearest(layer, kept, scores, torch.tensor([1.0, 2, 3, 4, 5, 6]))
    assert torch.allclose(matrix.sum(1), torch.ones(4, dtype=torch.float64))
    assert matrix[0].tolist() == [1, 0, 0, 0, 0, 0] and matrix[1].tolist() == [0, 0, 0, 1, 0, 0]
    rows = torch.nn.functional.normalize(layer.router.module.weight.detach(), dim=-1)
    for lost in (1, 2):
        into = 2 + int((rows[[4, 5]] @ rows[lost]).argmax())
        assert matrix[into, lost] > 0 and (matrix[:, lost] > 0).sum() == 1


def eep(model, matrices, route=None):
    tensors = {f"merge.{i}": m for i, m in enumerate(matrices)}
    tensors |= {f"route.{i}": m for i, m in enumerate(matrices if route is None else route)}
    return ExpertSkip(artifact=Artifact.create(tensors, policy="expert_skip", model=model))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_matrices_that_change_nothing_change_nothing(name):
    model, inputs = tiny(name)
    plain = run(model, inputs)
    got = run(model, inputs, eep(model, [torch.eye(6)] * 4))
    assert (got - plain).norm() <= 1e-5 * plain.norm()
    assert torch.equal(run(model, inputs), plain)


def test_matrices_of_ones_are_pruning():
    """Rows of one 1 each: the experts of hiding, and its softmax brought back to the same sum."""
    model, inputs = tiny("mixtral")
    with enable(model, ExpertSkip(prune=0.34)) as session:
        layers = mixtures(session.sites)
        kept = [~session.record(x.router).facts["known", 0, "plan"].hidden for x in layers]
    wanted = run(model, inputs, ExpertSkip(prune=0.34))
    got = run(model, inputs, eep(model, [torch.eye(6)[keep] for keep in kept]))
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_new_experts_are_the_averages_that_the_matrix_says():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(6, 5, 7, generator=generator)
    matrix = torch.rand(4, 6, generator=generator) * (torch.rand(4, 6, generator=generator) < 0.5)
    matrix[2] = torch.eye(6)[3]
    got = mixed(parameter, matrix)
    assert torch.allclose(got, torch.einsum("ij,jab->iab", matrix, parameter), atol=1e-6)
    assert torch.equal(got[2], parameter[3])


def test_wrong_matrices_are_refused():
    model, _ = tiny()
    for matrices, words in (
        ([torch.eye(6)] * 3, "no matrices merge.3"),
        ([torch.eye(5)] * 4, "has 6 experts"),
        ([torch.eye(6)[:2]] * 4, "asks 4"),
        ([torch.eye(6) * torch.nan] * 4, "no number"),
        ([torch.zeros(6, 6)] * 4, "routes nothing"),
    ):
        with pytest.raises(ArtifactError, match=words):
            enable(model, eep(model, matrices))


def test_matrices_are_followed_whatever_only_and_prune_say():
    model, inputs = tiny()
    last = torch.eye(6).roll(1, 0)
    policy = eep(model, [torch.eye(6)] * 3 + [torch.eye(6)[:4] + last[:4]])
    whole = run(model, inputs, policy)
    assert not torch.equal(whole, run(model, inputs))
    alone = ExpertSkip(artifact=Artifact.create(
        {n: t for n, t in policy.artifact.tensors.items() if n.endswith(".3")},
        policy="expert_skip", model=model,
    ))  # fmt: skip
    with torch.no_grad(), enable(model, alone, only="model.layers.3.*"):
        assert torch.allclose(model(**inputs).logits, whole, atol=1e-5)
    both = run(model, inputs, replace(policy, prune=0.25, merge=True))
    assert torch.equal(both, whole)


@pytest.mark.parametrize("free", [True, False])
def test_what_is_done_to_the_experts_that_stay_stays(free):
    """They may be trained, and frozen, while the others are out."""
    model, inputs = tiny()
    policy = (
        ExpertSkip(prune=0.25, free_memory=True) if free else ExpertSkip(prune=0.25, merge=True)
    )
    experts = model.model.layers[1].mlp.experts
    before = experts.down_proj.detach().clone()
    session = enable(model, policy)
    model.requires_grad_(False)
    with torch.no_grad():
        experts.down_proj.mul_(2.0)
    got = run(model, inputs) if free else None
    saved = model.state_dict()["model.layers.1.mlp.experts.down_proj"].clone() if free else None
    if free:
        session.disable()
        assert not torch.equal(got, run(*tiny()))
        ratio = (experts.down_proj / before).flatten(1).mean(1)
        assert sorted(ratio.round().tolist()) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        assert torch.equal(saved, experts.down_proj)
    else:
        with pytest.warns(InertWarning, match="changed while its experts were merged"):
            session.disable()
        assert torch.equal(experts.down_proj, before)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("policy", [
    [ExpertSkip(prune=0.25, mass=0.5)],
    [ExpertSkip(prune=0.25), ExpertSkip(mass=0.5)],
    [ExpertSkip(prune=0.25, top_k=1)],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["hidream", "qwen3_moe", "jamba", "deepseek_ocr2"])
def test_a_first_forward_is_pruned_like_the_next(name, policy):
    """A look at the router is no visit of it."""
    model, inputs = MOE[name].build(), MOE[name].inputs(2)
    with torch.no_grad(), enable(model, policy, strict=False):
        first, second = (contract.flat(model(**inputs))[0] for _ in range(2))
    assert torch.equal(first, second)


class Twice(nn.Module):
    """A mixture that is asked twice in a forward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.5 * self.inner(0.7 * x)


def test_a_mixture_that_runs_twice_is_one_mixture():
    model, inputs = tiny()
    layer = model.model.layers[1]
    layer.mlp = Twice(layer.mlp)
    masked = run(model, inputs, ExpertSkip(prune=0.25))
    gone = run(model, inputs, ExpertSkip(prune=0.25, free_memory=True))
    assert torch.equal(masked, gone) and not torch.equal(masked, run(model, inputs))
    fitted = ExpertSkip(mass=0.5).fit(model, inputs, target=2.0, progress=False)
    assert len(fitted.mass) == 4
    run(model, inputs, fitted)
    with torch.no_grad(), enable(model, ExpertSkip(top_k=(4, 1, 4, 4))) as session:
        model(**inputs)
        acted = {v["site"] for v in session.report().steps if v["action"] != "computed"}
    name = "model.layers.1.mlp.inner.experts"
    assert acted == {name, f"{name}#1"}


# -- fitting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"ratio": 0.5}, {"mass": 0.5}, {"floor": 0.1}, {"top_k": 1}])
def test_a_fitted_rule_keeps_what_was_asked(rule):
    model, inputs = tiny()
    target = 2.0
    fitted = ExpertSkip(**rule).fit(model, [inputs], target=target, progress=False)
    (name,) = rule
    assert isinstance(getattr(fitted, name), tuple) and len(getattr(fitted, name)) == 4
    kept = fitted.artifact.tensors["kept"]
    assert target - 0.6 <= kept.mean() <= target + 1e-6
    with torch.no_grad(), enable(model, fitted) as session:
        model(**inputs)
        visits = [v["numbers"].get("experts", 4.0) for v in session.report().steps]
    assert abs(visits[0] - kept[0]) < 1e-5  # later layers see what the first have changed


def test_top_k_is_found_without_data():
    model, _ = tiny()
    fitted = ExpertSkip(top_k=1).fit(model, None, target=2.5)
    assert sum(fitted.top_k) == 10 and all(1 <= k <= 4 for k in fitted.top_k)


def test_a_fitted_policy_is_for_its_model():
    model, inputs = tiny()
    fitted = ExpertSkip(mass=0.5).fit(model, [inputs], target=2.0, progress=False)
    with pytest.raises(ArtifactError, match="made for"):
        enable(tiny("olmoe")[0], fitted)


@pytest.mark.parametrize(
    ("policy", "given_", "words"),
    [
        (ExpertSkip(), {"target": 2.0}, "one rule"),
        (ExpertSkip(mass=0.5, ratio=0.5), {"target": 2.0}, "one rule"),
        (ExpertSkip(mass=0.5), {}, "target=None"),
        (ExpertSkip(mass=0.5), {"target": 9.0}, "out of range"),
        (ExpertSkip(prune=0.2), {"target": 2.0}, "give a share"),
    ],
)
def test_fitting_says_what_it_lacks(policy, given_, words):
    model, inputs = tiny()
    with pytest.raises(SpecError, match=words):
        policy.fit(model, [inputs], progress=False, **given_)


@pytest.mark.parametrize("generations", [0, -1, "3", 2.0])
def test_generations_are_a_number(generations):
    model, inputs = tiny()
    with pytest.raises(SpecError, match="give an integer"):
        ExpertSkip(prune=0.2).fit(
            model, inputs, target=0.2, generations=generations, progress=False
        )


@pytest.mark.parametrize("policy", [ExpertSkip(mass=0.5), ExpertSkip(prune=0.2)], ids=str)
def test_padding_tells_nothing(policy):
    model, inputs = tiny()
    ids = inputs["input_ids"]
    pad = torch.zeros(len(ids), 40, dtype=ids.dtype)
    wide = torch.cat((ids, pad), 1)
    mask = torch.cat((torch.ones_like(ids), pad), 1)
    target = None if policy.prune else 2.0
    data = UserDict(input_ids=wide, attention_mask=mask)  # as tokenizers give
    padded = policy.fit(model, data, target=target, progress=False)
    plain = policy.fit(model, {"input_ids": ids}, target=target, progress=False)
    a, b = padded.artifact.tensors, plain.artifact.tensors
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[n].float(), b[n].float(), rtol=1e-2, atol=1e-3) for n in a)
    assert padded.artifact.meta.get("tokens") == plain.artifact.meta.get("tokens")


@pytest.mark.parametrize("data", [True, False])
def test_mixtures_that_ask_different_numbers_of_experts_are_fitted(data):
    model, inputs = tiny()
    for layer, k in zip(model.model.layers, (2, 4, 4, 3), strict=True):
        layer.mlp.gate.top_k = k
    fitted = ExpertSkip(top_k=1).fit(model, inputs if data else None, target=2.5, progress=False)
    kept = [min(a, b) for a, b in zip(fitted.top_k, (2, 4, 4, 3), strict=True)]
    assert 2.0 <= sum(kept) / 4 <= 2.5
    with pytest.raises(SpecError, match=r"keeps 1\.00 to 3\.25 here"):
        ExpertSkip(mass=0.5).fit(model, inputs, target=3.5, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("policy", [ExpertSkip(mass=0.5), ExpertSkip(prune=0.2)], ids=str)
def test_fitting_does_not_depend_on_the_default_dtype(policy, dtype):
    model, inputs = tiny()
    target = None if policy.prune else 2.0
    wanted = policy.fit(model, inputs, target=target, progress=False).artifact.tensors
    torch.set_default_dtype(dtype)
    try:
        got = policy.fit(model, inputs, target=target, progress=False).artifact.tensors
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


def test_data_is_one_call_or_several_of_ids_or_keyword_arguments():
    model, inputs = tiny()
    ids = inputs["input_ids"]
    policy = ExpertSkip(mass=0.5)

    def fitted(data):
        return policy.fit(model, data, target=2.0, progress=False).artifact.tensors

    wanted = fitted([{"input_ids": ids}])
    for data in (ids, [ids], {"input_ids": ids}, UserDict(input_ids=ids), iter([ids])):
        got = fitted(data)
        assert all(torch.equal(got[n], wanted[n]) for n in wanted)
    fitted(ids[0])
    for wrong in ("text", ["text"], 3, [ids, None], [[1, 2]]):
        with pytest.raises(SpecError, match="token ids"):
            fitted(wrong)
        with pytest.raises(SpecError, match="token ids"):
            ExpertSkip(prune=0.25).fit(model, wrong, progress=False)
    for nothing in ([], ()):
        with pytest.raises(SpecError, match="at least one item"):
            fitted(nothing)
    for target in ("2", True, [2.0]):
        with pytest.raises(SpecError, match="target="):
            policy.fit(model, ids, target=target)


@pytest.mark.filterwarnings("ignore::accelerate_hooks.session.InertWarning")
def test_fitting_says_why_it_sees_nothing():
    model, inputs = tiny()
    with pytest.raises(SpecError, match="training mode"):
        ExpertSkip(mass=0.5).fit(model.train(), [inputs], target=2.0, progress=False)
    for name in ("hidream", "nucleus_moe_image"):
        model, inputs = tiny(name)
        with pytest.raises(UnsupportedModelError, match="yourself"):
            ExpertSkip(mass=0.5).fit(model, [inputs], target=1.5, progress=False)


@pytest.mark.parametrize("rule", [{"mass": 0.5}, {"top_k": 1}])
def test_an_artifact_brings_its_rule(rule, tmp_path):
    model, inputs = tiny()
    fitted = ExpertSkip(**rule).fit(model, [inputs], target=2.0, progress=False)
    path = tmp_path / "rule.safetensors"
    fitted.artifact.save(path)
    (read,) = parse(f"expert_skip:artifact='{path}'")
    assert read.policy == fitted and [a.policy for a in parse(str(fitted))] == [fitted]
    other = ExpertSkip(floor=0.1, artifact=fitted.artifact)
    assert other.rules == ["floor"]
    measured = ExpertSkip(prune=0.25).fit(model, [inputs], progress=False).artifact
    with pytest.raises(ArtifactError, match="no fitted rule"):
        ExpertSkip(artifact=measured)


@given(st.data())
def test_the_split_of_a_budget_is_the_best_of_all(data):
    curves = []
    for _ in range(data.draw(st.integers(1, 4))):
        steps = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        drops = sorted(
            data.draw(st.lists(st.floats(0, 5), min_size=len(steps), max_size=len(steps)))
        )
        cost = list(itertools.accumulate([1] * (len(steps) + 1)))
        gain = list(itertools.accumulate([0.0, *reversed(drops)]))
        curves.append((cost, gain))
    budget = data.draw(st.integers(len(curves), 16))
    places = split(curves, budget)
    spent = sum(cost[p] for (cost, _), p in zip(curves, places, strict=True))
    got = sum(gain[p] for (_, gain), p in zip(curves, places, strict=True))
    best = max(
        sum(gain[p] for (_, gain), p in zip(curves, some, strict=True))
        for some in itertools.product(*(range(len(c)) for c, _ in curves))
        if sum(cost[p] for (cost, _), p in zip(curves, some, strict=True)) <= budget
    )
    assert spent <= budget and got >= best - 1e-9


def test_evolution_finds_a_known_best_and_goes_on_where_it_was(tmp_path):
    best, asked = (8, 0, 3, 5, 0, 0), []

    def fitness(plan):
        asked.append(plan)
        return -sum((a - b) ** 2 for a, b in zip(plan, best, strict=True))

    given_ = {"most": [8] * 6, "total": 16, "generations": 30, "progress": False}
    kept = Resume(tmp_path / "plans", model=torch.nn.Linear(1, 1), data=[], total=16)
    plan, tried = evolve(fitness, **given_, resume=kept)
    assert plan == best and len(asked) == len(set(asked)) == len(tried)
    assert all(sum(p) == 16 and all(0 <= v <= 8 for v in p) for p in asked)
    before = len(asked)
    assert evolve(fitness, **given_, resume=kept)[0] == best and len(asked) == before
    with pytest.raises(SpecError, match="smaller target"):
        evolve(fitness, [1, 1], 3)


def test_budgets_of_a_model_are_searched_by_acceptance():
    model, inputs = tiny()
    policy = ExpertSkip(prune=0.2, criterion="frequency")
    fitted = policy.fit(model, [inputs], target=0.2, generations=2, progress=False)
    assert sum(fitted.prune) == 4 and 0 < fitted.artifact.meta["esap"] < 1
    run(model, inputs, fitted)
