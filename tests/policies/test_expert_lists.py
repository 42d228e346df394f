"""ExpertSkip on mixtures that call their experts themselves, in the ways of code that comes with
checkpoints: against the same mixture with weights of zero."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY
from torch import nn

from accelerate_hooks import ExpertSkip, InertWarning, LazyStep, enable

E, K, WIDTH = 6, 4, 40


class Expert(nn.Module):
    rows = 0  # that it has computed

    def __init__(self, size):
        super().__init__()
        self.w1, self.w2 = nn.Linear(size, WIDTH, bias=False), nn.Linear(WIDTH, size, bias=False)

    def forward(self, x):
        self.rows += len(x.flatten(0, -2))
        return self.w2(F.silu(self.w1(x)))


class Gate(nn.Linear):
    """DeepSeek's: indices and weights, not sorted."""

    def forward(self, x):
        scores = super().forward(x.flatten(0, -2)).softmax(-1)
        weights, indices = scores.topk(K, dim=-1, sorted=False)
        return indices, weights / weights.sum(-1, keepdim=True), None


class Mixture(nn.Module):
    policy = None  # whose rules are applied by hand

    def __init__(self, size):
        super().__init__()
        self.gate = Gate(size, E, bias=False)
        self.experts = nn.ModuleList(Expert(size) for _ in range(E))
        self.shared_experts = Expert(size)

    def weighed(self, weights):
        if self.policy is None:
            return weights
        ranked, order = weights.sort(dim=-1, descending=True)
        some = ranked * self.policy.keep(ranked, self.policy.top_k)
        some = some / some.sum(-1, keepdim=True)
        return torch.zeros_like(weights).scatter(-1, order, some)

    def forward(self, x):
        indices, weights, _ = self.gate(x)
        return self.mixed(x, indices, self.weighed(weights)) + self.shared_experts(x)

    def mixed(self, x, indices, weights):
        """Rows sorted by expert, as DeepSeek's own code has it."""
        flat, order = x.flatten(0, -2), indices.flatten().argsort()
        rows, outs, start = flat[order // K], [], 0
        for e, count in enumerate(indices.flatten().bincount(minlength=E).tolist()):
            if count:
                outs.append(self.experts[e](rows[start : start + count]))
            start += count
        out = torch.empty_like(rows)
        out[order] = torch.cat(outs)
        return (out.view(*indices.shape, -1) * weights.unsqueeze(-1)).sum(1).view(x.shape)


class Where(Mixture):
    """Mixtral's of old: logits from a plain linear layer, rows slot by slot."""

    def __init__(self, size):
        super().__init__(size)
        self.gate = nn.Linear(size, E, bias=False)

    def forward(self, x):
        flat = x.flatten(0, -2)
        weights, indices = self.gate(flat).softmax(-1).topk(K, dim=-1)
        weights = self.weighed(weights / weights.sum(-1, keepdim=True))
        mask = F.one_hot(indices, E).permute(2, 1, 0)
        out = torch.zeros_like(flat)
        for e in range(E):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.experts[e](flat[token]) * weights[token, slot, None])
        return out.view(x.shape) + self.shared_experts(x)


class Dense(Where):
    """Every expert on every token."""

    def forward(self, x):
        weights, indices = self.gate(x.flatten(0, -2)).softmax(-1).topk(K, dim=-1)
        weights = self.weighed(weights / weights.sum(-1, keepdim=True))
        full = torch.zeros(len(weights), E).scatter(-1, indices, weights).view(*x.shape[:-1], E)
        outs = torch.stack([expert(x) for expert in self.experts], -1)
        return (outs * full.unsqueeze(-2)).sum(-1) + self.shared_experts(x)


class Normed(Where):
    """Not linear in what its experts give."""

    def __init__(self, size):
        super().__init__(size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x):
        return self.norm(super().forward(x))


def build(mixture):
    model = TINY["llama"].build()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = mixture(96)
    return model.eval()


@pytest.mark.parametrize("mixture", [Mixture, Where, Dense])
@pytest.mark.parametrize("policy", [ExpertSkip(ratio=0.8), ExpertSkip(top_k=2)], ids=str)
def test_only_rows_that_are_kept_are_computed(mixture, policy):
    model, inputs = build(mixture), TINY["llama"].inputs(2)
    experts = [e for layer in model.model.layers for e in layer.mlp.experts]
    with torch.no_grad():
        plain = model(**inputs).logits
        with enable(model, ExpertSkip(ratio=0.0)):
            assert torch.equal(model(**inputs).logits, plain)
        before = [e.rows for e in experts]
        with enable(model, policy) as session:
            got = model(**inputs).logits
            report = session.report().to_dict()
        after = [e.rows for e in experts]
        Mixture.policy = policy
        try:
            wanted = model(**inputs).logits
        finally:
            Mixture.policy = None
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    rows = sum(after) - sum(before)
    most = E if mixture is Dense else K
    assert rows <= 4 * 14 * min(most - 1, policy.top_k or most)
    saved = report["totals"]["flops_saved"]
    assert saved == (4 * 14 * most - rows) * 4 * 96 * WIDTH


def test_what_cannot_be_read_is_said():
    model, inputs = build(Normed), TINY["llama"].inputs(2)
    with torch.no_grad():
        plain = model(**inputs).logits
        with enable(model, ExpertSkip(top_k=1)), pytest.warns(InertWarning, match="Normed weighs"):
            assert torch.equal(model(**inputs).logits, plain)


def test_a_module_that_is_a_site_of_two_kinds_has_two_lines():
    """HiDream's MLPs are mixtures: LazyStep acts at the one, ExpertSkip at the other."""
    model, inputs = TINY["hidream"].build(), TINY["hidream"].inputs(1)
    lazy = LazyStep(scope="site", criterion="cadence", every=2, warmup=1, cooldown=0)
    with torch.no_grad(), enable(model, [lazy, ExpertSkip(top_k=1)]) as session:
        with session.run(total=4):
            for step in range(4):
                model(**inputs | {"timesteps": inputs["timesteps"] * 0 + 900 - step})
        report = session.report()
    lines = {line["site"]: line for line in report.to_dict()["sites"]}
    twice = [name for name in lines if name.endswith(" (mlp)")]
    assert twice and str(report)
    for name in twice:
        whole, mixture = lines[name], lines[name.removesuffix(" (mlp)")]
        assert mixture["partly"] == whole["computed"] == 3 and whole["skipped"] == 1
        assert mixture["means_partly"]["experts"] == 1 and not whole["means_partly"]
