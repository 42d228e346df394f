"""The loop around a generation, and the head behind the last block."""

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import TINY

from accelerate_hooks import Effect, Policy, UnsupportedModelError, enable


@dataclass(frozen=True, kw_only=True)
class Loop(Policy):
    name: ClassVar[str] = "loop"
    kinds_: tuple[str, ...] = ("loop",)
    visits: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def kinds(self):
        return self.kinds_

    def acts(self, site):
        return frozenset({Effect.OBSERVE})

    def around(self, call):
        self.visits.append((call.site.kind, call.argument("max_new_tokens") == 3))
        return call.proceed()


def settings() -> dict[str, Any]:
    inputs = TINY["llama"].inputs(2)
    del inputs["use_cache"]
    return dict(inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_generation_is_visited_once():
    model = TINY["llama"].build()
    plain = model.generate(**settings())
    policy = Loop()
    with enable(model, policy) as session:
        assert torch.equal(model.generate(**settings()), plain)
        assert [site.name for site in session.sites] == ["generate"]
        with session.paused():
            model.generate(**settings())
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert not torch.equal(copied.generate(**settings()), plain)
        assert [entry.action for entry in session.trace if entry.site == "generate"] == ["run"]
    assert policy.visits == [("loop", True)]
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(**settings()), plain)


def test_forwards_inside_have_their_own_frames():
    model = TINY["llama"].build()
    policy = Loop(kinds_=("loop", "model"))
    with enable(model, policy):
        model.generate(**settings())
    assert [kind for kind, _ in policy.visits] == ["loop", "model", "model", "model"]


def test_without_a_wish_generate_is_left_alone():
    model = TINY["llama"].build()
    with enable(model, Loop(kinds_=("block",))):
        assert "generate" not in vars(model)
    with pytest.raises(UnsupportedModelError, match="no loop site"):
        enable(TINY["vit"].build(), Loop())


@dataclass(frozen=True, kw_only=True)
class Head(Policy):
    """Asks what the model would say of each block's output, without changing anything."""

    name: ClassVar[str] = "head"
    said: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    @property
    def kinds(self):
        return ("block",)

    def acts(self, site):
        return frozenset({Effect.OBSERVE})

    def around(self, call):
        out = call.proceed()
        self.said.append((call.site.index, call.head(call.outputs(out)[0])))
        return out


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt2", "bert", "vit", "dit", "wan"])
def test_the_head_behind_the_last_block_says_what_the_model_says(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    policy = Head()
    with torch.no_grad():
        plain = model(**inputs)
        plain = plain.logits if hasattr(plain, "logits") else plain[0]
        with enable(model, policy):
            out = model(**inputs)
    out = out.logits if hasattr(out, "logits") else out[0]
    assert torch.equal(out, plain)
    assert torch.equal(policy.said[-1][1], plain)
    earlier = policy.said[0][1]
    assert earlier.shape == plain.shape and not torch.equal(earlier, plain)


def test_the_head_leaves_a_cache_alone():
    model, policy = TINY["llama"].build(), Head()
    plain = model.generate(**settings())
    with enable(model, policy):
        assert torch.equal(model.generate(**settings()), plain)
    assert len(policy.said) == 12
