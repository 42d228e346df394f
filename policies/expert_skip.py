"""ExpertSkip: fewer experts a token, by their router's own weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from accelerate_hooks.call import Call
from accelerate_hooks.kernels import FALLBACKS, skip_experts
from accelerate_hooks.opaque import opaque_functions, uncompiled
from accelerate_hooks.policies._experts import Experts, error_of, read_experts
from accelerate_hooks.policy import Decides, Policy
from accelerate_hooks.site import Effect, Kind, Site


@dataclass(frozen=True, kw_only=True)
class ExpertSkip(Policy):
    """Leave out the experts of a token that weigh least.

    With the weights ``w_1 >= w_2 >= ... >= w_k`` that the router gave a token, expert ``s`` is kept
    if every rule that is set keeps it:

    top_k: ``s <= top_k``, for every layer, or a number a layer in the order of the model.
    ratio: ``w_s >= ratio * w_1`` (NAEE, arXiv 2402.14800: there for the second of two).
    mass: the fewest that hold a share ``mass`` of ``sum w``.
    floor: ``w_s >= floor``.
    min_experts: so many are kept whatever the rules say.
    max_dropped_mass: no token loses more than this share of ``sum w``: what the rules drop is taken
        back, greatest first, until that holds.

    Where the router's weights have one sum for all tokens (it normalises them) those of the kept
    experts are brought back to that sum; where not, they stay as they are.

    ``top_k`` narrows what the model's own experts are given. The other rules keep another number of
    experts for each token, and run `kernels.skip_experts`, in which a slot that is left out costs
    nothing; experts of a form that it does not know get as many slots as the token with most, the
    others weighed with zero.
    """

    name: ClassVar[str] = "expert_skip"

    top_k: int | tuple[int, ...] | None = None
    ratio: float | None = None
    mass: float | None = None
    floor: float | None = None
    min_experts: int = 1
    max_dropped_mass: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = self.top_k if isinstance(self.top_k, tuple) else (self.top_k,)
        ok = bool(counts) and all(count is None or count >= 1 for count in counts)
        self.require("top_k", ok, "an integer of at least 1, or one a layer")
        self.require("ratio", self.ratio is None or 0.0 <= self.ratio <= 1.0, "0 to 1")
        self.require("mass", self.mass is None or 0.0 < self.mass <= 1.0, "0 < mass <= 1")
        self.require("floor", self.floor is None or self.floor >= 0.0, "a number of at least 0")
        self.require("min_experts", self.min_experts >= 1, "an integer of at least 1")
        bound = self.max_dropped_mass
        self.require("max_dropped_mass", bound is None or 0.0 <= bound <= 1.0, "0 to 1")

    # -- settings ----------------------------------------------------------------------------

    @classmethod
    def exact(cls) -> Self:
        return cls()

    @classmethod
    def example(cls) -> Self:
        return cls(top_k=1)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("experts",)

    @property
    def ragged(self) -> bool:
        """Whether tokens keep different numbers of experts."""
        rules = (self.ratio, self.mass, self.floor, self.max_dropped_mass)
        return any(rule is not None for rule in rules)

    @property
    def decides(self) -> Decides:
        return "site" if self.ragged else "ahead"

    def acts(self, site: Site) -> frozenset[Effect]:
        return frozenset({Effect.REPLACE if self.ragged else Effect.RESHAPE})

    # -- one visit ---------------------------------------------------------------------------

    def around(self, call: Call) -> Any:
        routing = call.routing
        limit = self._limit(call)
        if routing is None or (limit is None and not self.ragged):
            return call.proceed()
        indices, weights = routing
        if indices.ndim != 2 or indices.shape != weights.shape:
            call.inert(
                f"expert_skip: {call.site.name} takes indices {tuple(indices.shape)} and weights "
                f"{tuple(weights.shape)}, not [tokens, k] for both; its experts are left alone"
            )
            return call.proceed()
        return self._fewer(call, indices, weights, limit)

    def _limit(self, call: Call) -> int | None:
        if not isinstance(self.top_k, tuple):
            return self.top_k
        return self.top_k[min(call.depth, len(self.top_k) - 1)]

    @uncompiled
    def _fewer(self, call: Call, indices: Tensor, weights: Tensor, limit: int | None) -> Any:
        k = indices.shape[1]
        count = min(k, max(limit or k, self.min_experts))
        if not self.ragged and count == k:
            return call.proceed()
        order = weights.float().argsort(dim=-1, descending=True, stable=True)
        ranked = weights.gather(1, order)
        indices = indices.gather(1, order)
        experts = self._experts(call)
        total = ranked.sum(-1, keepdim=True)
        if not self.ragged:
            some = self._renormalised(call, ranked[:, :count], total)
            call.note("narrowed", experts=float(count))
            return self._narrowed(call, indices[:, :count], some, experts, k)
        kept = self.keep(ranked, limit)
        some = self._renormalised(call, ranked * kept, total)
        lost = 1.0 - (ranked * kept).sum(-1) / total.squeeze(-1)
        counts = kept.sum(-1)
        mean, most, dropped, worst = call.read(
            counts.float().mean(), counts.max(), lost.float().mean(), lost.max()
        )
        numbers = {"experts": mean, "dropped_mass": max(0.0, dropped), "dropped_most": worst}
        if mean == k:
            call.note("all kept", **numbers)
            return call.proceed()
        call.note("fewer experts", **numbers)
        if experts is None:
            call.remark(
                f"expert_skip: {type(call.site.module).__name__} is of a form that skip_experts "
                "does not know; its tokens get as many slots as the one with most"
            )
            count = int(most)
            return self._narrowed(call, indices[:, :count], some[:, :count], experts, k)
        return call.compute(lambda: self._skip(call, experts, indices, some, mean / k))

    def _experts(self, call: Call) -> Experts | None:
        """The module's experts, if the kernel knows their form: tried once on the first visit."""

        def read() -> Experts | None:
            found = read_experts(call.site.module)
            if found is None or not self.ragged or call.routing is None:
                return found
            error = error_of(found, call.x, *call.routing, call.plain())
            return found if call.read(error)[0] <= 1.0 else None

        return call.known(read)

    def keep(self, ranked: Tensor, limit: int | None) -> Tensor:
        """Which of the weights ``[T, k]``, greatest first, are kept: bools, the first ones of each
        row."""
        k = ranked.shape[1]
        ranked = ranked.float()
        place = torch.arange(k, device=ranked.device)
        share = ranked / ranked.sum(-1, keepdim=True)
        before = share.cumsum(-1) - share
        kept = (place < (limit or k)).expand(ranked.shape)
        if self.ratio is not None:
            kept = kept & (ranked >= self.ratio * ranked[:, :1])
        if self.mass is not None and self.mass < 1.0:
            kept = kept & (before < self.mass)
        if self.floor is not None:
            kept = kept & (ranked >= self.floor)
        count = kept.cumprod(-1).sum(-1, keepdim=True).clamp(min=min(self.min_experts, k))
        if self.max_dropped_mass is not None:
            # with s kept, 1 - before[s] is lost; the last bit of a sum must not ask for one more
            needed = (1.0 - before > self.max_dropped_mass + 1e-6).sum(-1, keepdim=True)
            count = torch.maximum(count, needed)
        return place < count

    def _renormalised(self, call: Call, weights: Tensor, total: Tensor) -> Tensor:
        """Kept weights, with the sum that all had where the router normalises."""
        seen: list[Tensor] = call.slot(list)  # least and greatest sum of this run, on the device
        now = torch.stack((-total.amin(), total.amax())).float()
        seen[:] = [torch.maximum(seen[0], now) if seen else now]
        least, most = -seen[0][0], seen[0][1]
        same = most - least < 1e-2 * most
        if len(total) == 1 and call.step.index == 0:  # one token tells nothing; one sum is known
            same = same & ((most - 1.0).abs() < 1e-2)
        factor = total / weights.sum(-1, keepdim=True)
        return weights * torch.where(same, factor, torch.ones_like(factor))

    def _narrowed(
        self, call: Call, indices: Tensor, weights: Tensor, experts: Experts | None, k: int
    ) -> Any:
        spared = 0.0
        if experts is not None:
            spared = experts.flops * len(indices) * (k - indices.shape[1])
        routing = indices.contiguous(), weights.contiguous()
        return call.proceed(routing=routing, spared=spared)

    def _skip(
        self, call: Call, experts: Experts, indices: Tensor, weights: Tensor, share: float
    ) -> Tensor:
        whole = experts.flops * indices.numel()
        call.spare(whole * (1.0 - share), whole * share)
        before = FALLBACKS.copy()
        out = skip_experts(call.x, indices, weights, **experts.arguments)
        for (op, reason), _ in (FALLBACKS - before).items():
            call.remark(f"expert_skip: {op} runs without its fast kernel: {reason}")
        return out


opaque_functions(globals())
