"""`proceed(routing=)`: fewer experts a token, as if the others had no weight."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import TINY

from accelerate_hooks import Effect, Policy, enable

FAMILIES = (
    "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "qwen2_moe", "phimoe",
    "deepseek_v2", "glm4_moe", "dots1", "hunyuan_moe", "ernie4_5_moe",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Narrow(Policy):
    """Only the ``keep`` heaviest experts of each token: others left out, or weighed with zero."""

    name: ClassVar[str] = "narrow"
    keep: int | None = None
    zero: bool = False

    @property
    def kinds(self):
        return ("experts",)

    def acts(self, site):
        return frozenset({Effect.RESHAPE})

    def around(self, call):
        if self.keep is None:
            return call.proceed()
        index, weight = call.routing
        best = weight.topk(self.keep, -1)
        if self.zero:
            some = torch.zeros_like(weight).scatter(-1, best.indices, best.values)
            return call.proceed(routing=(index, some))
        return call.proceed(routing=(index.gather(-1, best.indices), best.values))


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_columns_are_the_same_as_zero_weights(name):
    model, inputs = TINY[name].build(), TINY[name].inputs(2)
    with torch.no_grad():
        plain = model(**inputs).logits
        got = {}
        for policy in (Narrow(), Narrow(keep=1), Narrow(keep=1, zero=True)):
            with enable(model, policy) as session:
                assert session.sites and all(site.kind == "experts" for site in session.sites)
                got[policy] = model(**inputs).logits
    same, narrow, zero = got.values()
    scale = plain.abs().max()
    assert torch.equal(same, plain)
    assert (narrow - zero).abs().max() < 1e-5 * scale
    assert (narrow - plain).abs().max() > 1e-3 * scale
