"""ExpertSkip on every family with mixture-of-experts layers, against slow oracles made of the
model's own parts."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from moe_models import MOE, REFUSED, UNSERVED
from torch import nn

from accelerate_hooks import ExpertSkip, InertWarning, UnsupportedModelError, enable
from accelerate_hooks.policies._experts import read_experts
from accelerate_hooks.registry import patch_for

# Their activation, or what stands beside the two matrices, is none that the kernel knows: they run
# by their own forward. May only become shorter.
OWN_FORWARD = {
    "deepseek_v4", "glm5_next", "hy_v4", "inkling2", "longcat_flash", "minimax_m3_vl", "muse_spark",
    "nllb_moe", "openai_privacy_filter", "step3p7",
}  # fmt: skip
# Their routers do not weigh all tokens to one sum, by their code.
UNNORMALISED = {
    "deepseek_ocr2", "deepseek_v2", "dots1", "flex_olmo", "hidream", "inkling", "jamba", "kolibri1",
    "longcat_flash", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "unlimited_ocr",
}  # fmt: skip
INSIDE = {"hidream", "nucleus_moe_image"}  # the routing is no argument of a module
UNFITTED = {*INSIDE, "nllb_moe"}  # nor what every token asks, here
POLICIES = [ExpertSkip(ratio=0.8), ExpertSkip(top_k=1)]
NOTHING = [ExpertSkip(ratio=0.0), ExpertSkip(mass=1.0), ExpertSkip(top_k=64), ExpertSkip()]


class Family:
    def __init__(self, name):
        self.name = name
        self.model, self.inputs = MOE[name].build(), MOE[name].inputs(2)
        found = patch_for(self.model).sites(self.model)
        self.sites = [site for site in found if site.kind == "experts"]
        self.routers = [site for site in found if site.kind == "router"]
        self.plain = self.outputs()

    def outputs(self):
        with torch.no_grad():
            out = self.model(**self.inputs)
        values = out.values() if hasattr(out, "values") else out
        return [t for t in values if isinstance(t, torch.Tensor)]

    def same(self):
        return all(torch.equal(a, b) for a, b in zip(self.outputs(), self.plain, strict=True))


@pytest.fixture(scope="module", params=MOE)
def family(request):
    return Family(request.param)


def test_every_modelling_file_with_experts_is_listed():
    """In the installed transformers, where a class or the experts' interface says that there are
    some."""
    models = Path(transformers.__file__).parent / "models"
    named = re.compile(
        r"^@use_experts_implementation|^class \w*(Experts|MoE|Moe)\(nn", re.MULTILINE
    )
    files = {path.parent.name for path in models.glob("*/modeling_*.py")
             if named.search(path.read_text(encoding="utf-8"))}  # fmt: skip
    renamed = {"hunyuan_moe": "hunyuan_v1_moe"}
    listed = {renamed.get(name, name) for name in (*MOE, *UNSERVED)}
    assert len(MOE) >= 40 and not set(MOE) & set(UNSERVED)
    assert files <= listed, files - listed


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_by_name(name):
    tiny = REFUSED[name]
    assert tiny.cls == UNSERVED[name][0]
    model, inputs = tiny.build(), tiny.inputs(2)
    try:
        with torch.no_grad(), enable(model, ExpertSkip(top_k=1)), pytest.warns(InertWarning):
            model(**inputs)
    except UnsupportedModelError as error:
        assert "expert_skip found no experts site" in str(error) and tiny.cls in str(error)


def test_its_experts_and_routers_are_found(family):
    assert family.sites
    blocks = {(site.stack, site.index) for site in family.routers}
    assert all((site.stack, site.index) in blocks for site in family.sites)


def test_the_kernel_reads_its_experts(family):
    known = [read_experts(site.module) is not None for site in family.sites]
    if family.name in OWN_FORWARD | INSIDE:
        assert not all(known)
    else:
        assert all(known)


@pytest.mark.parametrize("policy", NOTHING, ids=str)
def test_nothing_skipped_is_bit_exact(family, policy):
    with enable(family.model, policy) as session:
        assert family.same()
        assert not any(session.skips.values())
    assert family.same()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_it_agrees_with_weights_of_zero(family, policy):
    """Slots that are left out, against the model's own experts with weights of zero there."""
    seen, handles = {}, []
    for site in family.sites:

        def look(module, args, kwargs, out, site=site):
            seen.setdefault(site, (args, kwargs, out))

        handles.append(site.module.register_forward_hook(look, with_kwargs=True))
    with enable(family.model, policy) as session:
        family.outputs()
        totals = session.report().to_dict()["totals"]
    for handle in handles:
        handle.remove()
    dropped = 0
    for site, (args, kwargs, out) in seen.items():
        module = site.module
        with torch.no_grad():
            one_sum = family.name not in UNNORMALISED
            wanted, some = oracle(policy, one_sum, module, args, kwargs)
        dropped += some
        assert (out - wanted).norm() <= 2e-5 * wanted.norm(), site.name
    assert bool(dropped) == bool(totals["flops_saved"]) == bool(totals["partly"])
    assert dropped or policy.ratio
    assert family.same()
    assert not any("forward" in vars(m) for m in family.model.modules())


def weighed(policy, one_sum, weights):
    """What is kept of weights ``[T, k]``: new weights, zero elsewhere; and how many are dropped."""
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    kept = policy.keep(ranked, policy.top_k)
    total = ranked.sum(-1, keepdim=True)
    some = ranked * kept
    if one_sum:
        some = some * (total / some.sum(-1, keepdim=True)).nan_to_num(0.0)
    dropped = int(((ranked > 0) & ~kept).sum())
    return torch.zeros_like(weights).scatter(-1, order, some), dropped


def oracle(policy, one_sum, module, args, kwargs):
    experts = getattr(module, "experts", None)
    if experts is None:
        hidden, indices, weights = (*args, *kwargs.values())
        some, dropped = weighed(policy, one_sum, weights)
        return module(hidden, indices, some), dropped
    if isinstance(experts, nn.ModuleList):
        return listed(policy, one_sum, module, args, kwargs)
    return choosing(policy, one_sum, module, *args, **kwargs)


def listed(policy, one_sum, module, args, kwargs):
    """The router gives weights of zero."""
    count = []

    def change(gate, inputs, out):
        some, dropped = weighed(policy, one_sum, out[1])
        count.append(dropped)
        return out[0], some, *out[2:]

    handle = module.gate.register_forward_hook(change)
    out = module(*args, **kwargs)
    handle.remove()
    return out, sum(count)


def choosing(policy, one_sum, layer, hidden, unmodulated, *, timestep):
    """NucleusMoE-Image, an expert and a token at a time."""
    batch, tokens, width = hidden.shape
    time = timestep.unsqueeze(1).expand(-1, tokens, -1)
    logits = layer.gate(torch.cat([time, unmodulated], -1))
    scores = logits.sigmoid() if layer.use_sigmoid else logits.softmax(-1)
    most = max(1, math.ceil(layer.capacity_factor * tokens / layer.num_experts))
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(most, dim=1).indices, 1.0)
    weights = scores * chosen
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-12) * layer.route_scale
    some, dropped = weighed(policy, one_sum, weights.flatten(0, 1))
    out = layer.shared_expert(hidden).flatten(0, 1)
    x = hidden.flatten(0, 1)
    for e in range(layer.num_experts):
        gate, up = (x @ layer.experts.gate_up_proj[e]).chunk(2, -1)
        y = (nn.functional.silu(gate) * up) @ layer.experts.down_proj[e]
        out = out + some[:, e : e + 1] * y
    return out.view(batch, tokens, width), dropped


@pytest.mark.parametrize("with_data", [True, False], ids=["data", "noise"])
def test_top_k_is_fitted(family, with_data):
    most = [getattr(site.module, "top_k", None) for site in family.routers]
    fit = functools.partial(
        ExpertSkip(top_k=1).fit, family.model, family.inputs if with_data else None, progress=False
    )
    if family.name in UNFITTED:
        with pytest.raises(UnsupportedModelError, match="give the numbers"):
            fit(target=1.5)
        return
    fitted = fit(target=1.5)
    assert len(fitted.top_k) == len({site.path for site in family.sites})
    if not with_data:  # which does not reach every mixture
        assert 1.0 <= fitted.artifact.tensors["kept"].mean() <= 1.5 + 1e-6
    assert all(k is None or 1 <= n <= k for n, k in zip(fitted.top_k, most, strict=False))
    assert family.same()
