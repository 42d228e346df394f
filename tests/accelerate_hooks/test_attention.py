"""`call.attention`: whoever computes it, the model's own result is bit-equal, and nothing stays."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import TINY
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from accelerate_hooks import Effect, Policy, UnsupportedModelError, enable
from accelerate_hooks.attention import Attention

# name: attentions a forward (Wan's image-to-video attends twice in one visit)
SEEN = {"flux": 8, "wan": 8, "wan_i2v": 12, "unet": None, "llama": 4, "gemma2": 4, "gpt_oss": 4}


def default(attention: Attention) -> torch.Tensor:
    return attention.default()


@dataclass(frozen=True, kw_only=True)
class Attend(Policy):
    name: ClassVar[str] = "attend"
    fn: Callable[[Attention], torch.Tensor] = default
    seen: list[Attention] = field(default_factory=list)

    @property
    def kinds(self):
        return ("attention",)

    def acts(self, site):
        return frozenset({Effect.REPLACE})

    def around(self, call):
        def fn(attention: Attention) -> torch.Tensor:
            self.seen.append(attention)
            return self.fn(attention)

        return call.attention(fn)


def keys() -> set[str]:
    return set(ALL_ATTENTION_FUNCTIONS)


def configs(model: nn.Module) -> dict[str, Any]:
    return {name: vars(module).get("config") for name, module in model.named_modules()}


@pytest.mark.parametrize("name", [*SEEN, "bert", "bart", "t5", "vit", "deepseek_v3", "opt"])
def test_the_default_is_bit_equal_and_nothing_stays(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    before, registered = configs(model), keys()
    policy = Attend()
    with torch.no_grad():
        plain = model(**inputs)[0]
        with enable(model, policy) as session:
            assert torch.equal(model(**inputs)[0], plain)
            sites = len(session.sites)
        assert torch.equal(model(**inputs)[0], plain)
    wanted = SEEN.get(name) or len(policy.seen)
    assert len(policy.seen) == wanted >= sites
    assert keys() == registered
    after = configs(model)
    assert after.keys() == before.keys()
    assert all(after[path] is before[path] for path in before)


def test_what_an_attention_is_told():
    told = {}
    for name in ("llama", "gemma2", "gpt_oss", "wan_i2v", "flux", "bart"):
        policy = Attend()
        with torch.no_grad(), enable(TINY[name].build(), policy) as session:
            session.roots[0].model(**TINY[name].inputs(2))
        told[name] = policy.seen
    for name in ("llama", "gemma2", "gpt_oss"):
        first = told[name][0]
        assert first.q.shape == (2, 8, 7, 12) and first.k.shape == (2, 4, 7, 12)
        assert first.groups == 2 and first.ordinal == 0 and not first.is_cross
    assert told["gemma2"][0].extra["softcap"] and told["gpt_oss"][0].extra["sinks"].shape == (8,)
    assert "window" in told["gpt_oss"][0].extra and "window" not in told["gpt_oss"][1].extra
    assert [a.ordinal for a in told["wan_i2v"][:3]] == [0, 0, 1]
    assert [a.is_cross for a in told["wan_i2v"][:3]] == [False, True, True]
    assert not any(a.is_cross for a in told["flux"])
    assert [a.is_cross for a in told["bart"]] == [False] * 4 + [False, True] * 4


@pytest.mark.parametrize("name", ["llama", "flux"])
def test_another_attention_takes_the_place(name):
    """The same arithmetic by hand agrees to rounding."""

    def by_hand(a: Attention) -> torch.Tensor:
        k, v = (t.repeat_interleave(a.groups, 1) for t in (a.k, a.v))
        scores = a.q @ k.transpose(-1, -2) * (a.scale or a.q.shape[-1] ** -0.5)
        if a.is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        if a.mask is not None:
            assert a.mask.dtype != torch.bool
            scores = scores + a.mask
        return scores.softmax(-1) @ v

    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    with torch.no_grad():
        plain = model(**inputs)[0]
        with enable(model, Attend(fn=by_hand)):
            assert torch.allclose(model(**inputs)[0], plain, atol=1e-5 * float(plain.abs().max()))
        with enable(model, Attend(fn=lambda a: torch.zeros_like(a.default()))):
            assert not torch.allclose(model(**inputs)[0], plain, atol=1e-2)


def test_two_sessions_on_two_models():
    registered = keys()
    with torch.no_grad():
        models = [TINY["llama"].build() for _ in range(2)]
        inputs = TINY["llama"].inputs(2)
        plain = models[0](**inputs).logits
        first, second = Attend(), Attend(fn=lambda a: a.default() * 0)
        one, two = enable(models[0], first), enable(models[1], second)
        assert torch.equal(models[0](**inputs).logits, plain)
        assert not torch.equal(models[1](**inputs).logits, plain)
        one.disable()
        assert not torch.equal(models[1](**inputs).logits, plain)
        assert torch.equal(models[0](**inputs).logits, plain)
        two.disable()
        assert torch.equal(models[1](**inputs).logits, plain)
    assert (len(first.seen), len(second.seen)) == (4, 8)
    assert keys() == registered


@pytest.mark.parametrize("name", ["bloom", "gptj", "xlnet"])
def test_an_attention_that_never_reaches_us_is_an_error(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    registered = keys()
    kinds = {type(m).__name__ for m in model.modules()}
    with (
        torch.no_grad(),
        enable(model, Attend()),
        pytest.raises(UnsupportedModelError, match="never reached") as error,
    ):
        model(**inputs)
    assert any(f"({kind} in {type(model).__name__})" in str(error.value) for kind in kinds)
    assert keys() == registered


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_copies_need_nothing_of_ours(name, tmp_path):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    with torch.no_grad():
        plain = model(**inputs).logits
        twin = copy.deepcopy(model)
        with enable(model, Attend(fn=lambda a: a.default() * 0)):
            copied, dumped = copy.deepcopy(model), pickle.dumps(model)
            shallow = copy.copy(next(c for c in configs(model).values() if hasattr(c, "__copy__")))
            assert torch.equal(copied(**inputs).logits, plain)
        assert torch.equal(copied(**inputs).logits, plain)
        assert torch.equal(pickle.loads(dumped)(**inputs).logits, plain)
    of_copy, of_twin = configs(copied), configs(twin)
    for path in of_twin:
        assert type(of_copy[path]) is type(of_twin[path])
        if of_twin[path] is not None:
            assert vars(of_copy[path]).keys() == vars(of_twin[path]).keys()
            assert (of_copy[path] is of_copy[""]) == (of_twin[path] is of_twin[""])
    assert not any("accelerate_hooks" in key for key in vars(shallow))
    assert b"accelerate_hooks" not in dumped
    (tmp_path / "model").write_bytes(dumped)
    torch.save((inputs, plain), tmp_path / "data")
    script = (
        "import pickle, sys, torch, transformers\n"
        f"model = pickle.load(open({str(tmp_path / 'model')!r}, 'rb'))\n"
        f"inputs, plain = torch.load({str(tmp_path / 'data')!r})\n"
        "with torch.no_grad(): assert torch.equal(model(**inputs).logits, plain)\n"
        "assert not any(name.startswith('accelerate_hooks') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=300)


def test_the_function_mode_sees_positional_calls():
    from accelerate_hooks.attention import AttentionMode

    q = torch.randn(1, 2, 3, 4)
    mask = torch.ones(3, 3, dtype=torch.bool)
    seen = []
    with AttentionMode(lambda a: (seen.append(a), a.default())[1], None, None) as mode:
        out = F.scaled_dot_product_attention(q, q, q, mask, 0.0, False)
    assert mode.calls == 1 and seen[0].mask is mask and not seen[0].is_causal
    assert torch.equal(out, F.scaled_dot_product_attention(q, q, q, mask))
