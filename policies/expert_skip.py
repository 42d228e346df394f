"""ExpertSkip: fewer experts a token, by their router's own weights, or fewer in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar, get_args

import torch
from torch import Tensor, nn

from accelerate_hooks.artifact import Artifact
from accelerate_hooks.call import Call
from accelerate_hooks.errors import ArtifactError, SpecError
from accelerate_hooks.kernels import heard, skip_experts
from accelerate_hooks.opaque import opaque_functions, uncompiled
from accelerate_hooks.policies import _lists, _pruning, _sums, _weighing
from accelerate_hooks.policies._experts import (
    Experts,
    error_of,
    least_slots,
    look_of,
    read_experts,
    sample,
    slot_flops,
)
from accelerate_hooks.policies._pruning import Criterion
from accelerate_hooks.policies._routers import Plan, route
from accelerate_hooks.policies._stand_ins import instead, means_of
from accelerate_hooks.policies._surgery import refuse_deleted
from accelerate_hooks.policies._twins import has_own_forward
from accelerate_hooks.policy import Decides, Policy
from accelerate_hooks.site import Effect, Kind, Site

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ExpertSkip(Policy):
    """Leave out the experts of a token that weigh least.

    With the weights ``w_1 >= w_2 >= ... >= w_k`` that the router gave a token, expert ``s`` is kept
    if every rule that is set keeps it:

    top_k: ``s <= top_k``; like every rule one number, or one a layer in the order of the model.
    ratio: ``w_s >= ratio * w_1`` (NAEE, arXiv 2402.14800: there for the second of two).
    mass: the fewest that hold a share ``mass`` of ``sum w``.
    floor: ``w_s >= floor``.
    min_experts: so many are kept whatever the rules say.
    max_dropped_mass: no token loses more than this share of ``sum w``: what the rules drop is taken
        back, greatest first, until that holds.

    compensate: where `fit` measured what each expert gives on average, that stands in for an expert
        that is left out, at its weight; False does without.

    Where nothing stands in, and the router's weights have one sum for all tokens (it normalises
    them), those of the kept experts are brought back to that sum; else they stay as they are.

    ``top_k`` narrows what the model's own experts are given. The other rules keep another number of
    experts for each token, and run `kernels.skip_experts`, in which a slot that is left out costs
    nothing; experts of a form that it does not know run in turn for the tokens that keep one
    expert, two, and so on.

    Once, at ``enable``:

    prune: a share of the experts of each layer, or a number a layer, that no token is given; the
        next best take their place. Their logits are ``-inf`` in the router, before its softmax.
    criterion: those with least of it go. ``"aimer"`` needs no data (arXiv 2603.18492); what the
        others measure comes from ``fit``: ``"frequency"`` (how often an expert is asked),
        ``"router_weight"`` (its mean weight), ``"activation_norm"`` (the sum of its outputs'
        norms), ``"reap"`` (the mean of weight times norm where it is asked, arXiv 2510.13999).
    merge: what goes is averaged into what is left: each into the nearest (by the router's rows) of
        the worse half, by how often they are asked where that is known. An artifact with matrices
        ``merge.<i>`` ``[E', E]`` and ``route.<i>`` ``[E', E]`` for mixture i is followed instead
        (EEP, arXiv 2407.00945): new experts ``merge @ experts``, chosen by
        ``softmax(logits) @ route.T``.
    free_memory: the pruned experts are really taken out, and lie on the CPU until the session ends;
        with ``irreversible`` they are deleted, and after the session a forward, a copy, a pickle, a
        state dict and another ExpertSkip raise: the model has to be loaded again.

    What ``merge`` and ``free_memory`` make of a model it is in every forward of the session, with
    gradients on and while paused, too.
    """

    name: ClassVar[str] = "expert_skip"
    RULES: ClassVar[tuple[str, ...]] = ("top_k", "ratio", "mass", "floor")

    top_k: int | tuple[int, ...] | None = None
    ratio: float | tuple[float, ...] | None = None
    mass: float | tuple[float, ...] | None = None
    floor: float | tuple[float, ...] | None = None
    min_experts: int = 1
    max_dropped_mass: float | None = None
    compensate: bool = True
    prune: float | tuple[int, ...] | None = None
    criterion: Criterion = "aimer"
    merge: bool = False
    free_memory: bool = False
    irreversible: bool = False
    artifact: Artifact | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.artifact is not None and not self.rules and not self.prunes:
            self._follow(self.artifact)
        self._require_all("top_k", lambda n: n >= 1, "an integer of at least 1, or one a layer")
        self._require_all("ratio", lambda r: 0.0 <= r <= 1.0, "0 to 1, or one a layer")
        self._require_all("mass", lambda m: 0.0 < m <= 1.0, "0 < mass <= 1, or one a layer")
        self._require_all("floor", lambda f: f >= 0.0, "a number of at least 0, or one a layer")
        self.require("min_experts", self.min_experts >= 1, "an integer of at least 1")
        bound = self.max_dropped_mass
        self.require("max_dropped_mass", bound is None or 0.0 <= bound <= 1.0, "0 to 1")
        least = 0 if isinstance(self.prune, tuple) else 0.0
        most = float("inf") if isinstance(self.prune, tuple) else 1.0
        wanted = "a share of 0 <= prune < 1, or a number of experts a layer"
        self._require_all("prune", lambda n: least <= n < most, wanted)
        wanted = f"one of {', '.join(map(repr, get_args(Criterion)))}"
        self.require("criterion", self.criterion in get_args(Criterion), wanted)
        for name in ("merge", "free_memory"):
            ok = self.prunes or not getattr(self, name)
            self.require(name, ok, "False, or a share to prune with it")
        ok = self.free_memory or not self.irreversible
        self.require("irreversible", ok, "False, or free_memory=True with it")

    def _follow(self, artifact: Artifact) -> None:
        """Take the rule that was fitted, where none is set."""
        rule, values = artifact.meta.get("rule"), artifact.tensors.get("thresholds")
        if rule not in self.RULES or values is None:
            where = f"{artifact.path}: the" if artifact.path else "the"
            raise ArtifactError(
                f"{where} artifact holds no fitted rule to follow; set one of "
                f"{', '.join(self.RULES)}, or prune with what it measured"
            )
        kind = int if rule == "top_k" else float
        object.__setattr__(self, rule, tuple(map(kind, values.tolist())))

    def _require_all(self, name: str, ok: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else (value,)
        fine = bool(values) and all(v is None or ok(v) for v in values)
        self.require(name, fine, wanted)

    # -- settings ----------------------------------------------------------------------------

    @classmethod
    def exact(cls) -> Self:
        return cls()

    @classmethod
    def example(cls) -> Self:
        return cls(top_k=1)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("router", "experts") if self.prunes else ("experts",)

    @property
    def rules(self) -> list[str]:
        """Those that are set."""
        return [name for name in self.RULES if getattr(self, name) is not None]

    @property
    def prunes(self) -> bool:
        """Whether experts are taken from the model as a whole."""
        return self.prune is not None or self.follows_matrices

    @property
    def takes_out(self) -> bool:
        """Whether experts are really gone, and not only hidden from their router."""
        return self.merge or self.free_memory or self.follows_matrices

    @property
    def trains(self) -> bool:  # type: ignore[override]
        """What is gone is so in every forward."""
        return self.takes_out and self.top_k is None and not self.ragged

    @property
    def follows_matrices(self) -> bool:
        """Whether an artifact says what new experts are made of which."""
        names = () if self.artifact is None else self.artifact.tensors
        return any(name.startswith("merge.") for name in names)

    @property
    def ragged(self) -> bool:
        """Whether tokens keep different numbers of experts."""
        rules = (self.ratio, self.mass, self.floor, self.max_dropped_mass)
        return any(rule is not None for rule in rules)

    @property
    def decides(self) -> Decides:
        return "site" if self.ragged else "ahead"

    def acts(self, site: Site) -> frozenset[Effect]:
        if site.kind == "router":
            return frozenset({Effect.REPLACE})  # the numbers of the experts: one policy's alone
        adds = self.artifact is not None and self.compensate
        return frozenset({Effect.REPLACE if self.ragged or adds else Effect.RESHAPE})

    def check(self, session: Any) -> list[str]:
        refuse_deleted(session.sites)
        for root in session.roots:
            count = sum(s.kind == "experts" and not s.visit for s in root.sites)
            for name in self.rules:
                value = getattr(self, name)
                if isinstance(value, tuple) and len(value) != count:
                    raise SpecError(
                        f"expert_skip: {name} has {len(value)} numbers, "
                        f"{type(root.model).__name__} {count} mixtures; give one a mixture, or one "
                        "for all"
                    )
        if self.artifact is not None:
            for root in session.roots:
                self.artifact.check(policy=self.name, model=root.model)
        return []

    def install(self, session: Any) -> None:
        if self.prunes:
            _pruning.install(self, session)

    def fit(
        self,
        model: Any,
        data: Any,
        *,
        target: float | None = None,
        resume: str | None = None,
        progress: bool = True,
        generations: int = 50,
    ) -> Self:
        """Find what the settings leave open, on ``data``: keyword arguments of the model or token
        ids ``[batch, tokens]``, of one call or a list of calls.

        With one rule set (``ExpertSkip(mass=0.9)``), its number a layer, such that ``target``
        experts are kept on average, where leaving out costs least, and what each expert gives on
        average, to stand in for it (``compensate``). ``top_k`` needs no data: with
        ``data=None`` the experts are tried on noise (LExI, arXiv 2509.02753).

        With ``prune``, what ``criterion`` measures; and with a ``target``, a share of all experts,
        how many go in each layer: EvoESAP's evolution (arXiv 2603.06003) over so many
        ``generations``, the acceptance of the full model's tokens as fitness. ``resume`` keeps what
        was tried.

        Returns a policy with the numbers found and an artifact that says what for: given to a
        policy without a rule, it brings its own.
        """
        from accelerate_hooks.policies import _fitting

        if target is not None and (type(target) is bool or not isinstance(target, (int, float))):
            raise SpecError(
                f"expert_skip: target={target!r} is a {type(target).__name__}; give a number"
            )
        if self.prune is not None:
            return _fitting.fit_pruning(self, model, data, target, generations, resume, progress)
        return _fitting.fit_rule(self, model, data, target, progress)

    def with_rule(self, rule: str, value: Any) -> Self:
        return replace(self, **{rule: value})

    # -- one visit ---------------------------------------------------------------------------

    def around(self, call: Call) -> Any:
        if call.site.kind == "router":
            plan: Plan | None = call.known(lambda: None, "plan")
            return call.proceed() if plan is None else route(call, plan)
        limit = self._limit(call)
        if limit is None and not self.ragged:
            return call.proceed()
        if call.routing is None:
            return self._inside(call, lambda i, w: self._slots(call, i, w, limit))
        indices, weights = call.routing
        fine = indices.ndim == call.x.ndim == 2 and not indices.is_floating_point()
        if not fine or indices.shape != weights.shape:
            call.inert(
                f"expert_skip: {call.site.name} takes indices {tuple(indices.shape)} and weights "
                f"{tuple(weights.shape)}, not [tokens, k] for both; its experts are left alone"
            )
            return call.proceed()
        return self._fewer(call, indices, weights, limit)

    def _limit(self, call: Call) -> int | None:
        return _at(self.top_k, call.depth)

    @uncompiled
    def _fewer(self, call: Call, indices: Tensor, weights: Tensor, limit: int | None) -> Any:
        k = indices.shape[1]
        if k == 1:
            call.inert(
                f"expert_skip: {call.site.name} asks one expert a token; none can be left out"
            )
        count = min(k, max(limit or k, self.min_experts))
        if len(indices) == 0 or (not self.ragged and count == k):
            return call.proceed()
        order = weights.float().argsort(dim=-1, descending=True, stable=True)
        ranked = weights.gather(1, order)
        indices = indices.gather(1, order)
        total = ranked.sum(-1, keepdim=True)
        means = means_of(self, call)
        if not self.ragged:
            first = torch.arange(k, device=ranked.device) < count
            some = self._weighed(call, ranked, first, total, means)
            call.note("narrowed", experts=float(count))
            routing = self._columns(call, indices, some, count)
            spared = slot_flops(call.site.module) * len(indices) * (k - routing[0].shape[1])
            out = call.proceed(routing=routing, spared=spared)
            return out if means is None else out + instead(means, indices, ranked * ~first)
        kept = self.keep(ranked, limit, call.depth)
        some = self._weighed(call, ranked, kept, total, means)
        lost = _lost(ranked, kept)
        counts = kept.sum(-1)
        tokens = (counts.unsqueeze(1) == torch.arange(1, k + 1, device=counts.device)).sum(0)
        *sizes, dropped, worst = call.read(*tokens, lost.mean(), lost.max())
        mean = sum(n * c for n, c in enumerate(sizes, 1)) / len(indices)
        numbers = {"experts": mean, "dropped_mass": max(0.0, dropped), "dropped_most": worst}
        if mean == k:
            call.note("all kept", **numbers)
            return call.proceed()
        call.note("fewer experts", **numbers)
        experts = self._experts(call)
        more = None if means is None else instead(means, indices, ranked * ~kept)
        if experts is None:
            call.remark(
                f"expert_skip: {type(call.site.module).__name__} is of a form that skip_experts "
                "does not know; it runs once for the tokens that keep one expert, once for two, ..."
            )
            order = counts.argsort(stable=True).split([int(n) for n in sizes])
            out = call.compute(lambda: self._in_turn(call, indices, some, order))
        else:
            out = call.compute(lambda: self._skip(call, experts, indices, some, mean / k))
        return out if more is None else out + more

    @uncompiled
    def _inside(self, call: Call, decide: _lists.Decide) -> Any:
        """A module that calls its experts in a way of its own."""
        module = call.site.module
        if not has_own_forward(module):
            call.inert(
                f"expert_skip: the forward of {call.site.name} was replaced (offloading, another "
                "tool), and only the class's own can be given fewer rows; its experts are left "
                "alone"
            )
            return call.proceed()
        listed = isinstance(module.experts, nn.ModuleList)
        told = listed and call.known(lambda: _lists.asked(call) is not None, "tells")
        return (_lists if told else _weighing).run(call, decide)

    @uncompiled
    def _slots(
        self, call: Call, indices: Tensor, weights: Tensor, limit: int | None
    ) -> tuple[Tensor, Tensor] | None:
        """Where no routing is given: which slots are kept, and what all of them weigh then."""
        if len(indices) == 0:
            return None
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        kept = self.keep(weights, limit, call.depth)
        total = weights.sum(-1, keepdim=True)
        some = self._renormalised(call, weights * kept, total)
        lost = _lost(weights, kept)
        mean, dropped, worst = call.read(kept.sum(-1).float().mean(), lost.mean(), lost.max())
        numbers = {"experts": mean, "dropped_mass": max(0.0, dropped), "dropped_most": worst}
        call.note("all kept" if mean == indices.shape[1] else "fewer experts", **numbers)
        if mean == indices.shape[1]:
            return None
        back = order.argsort(-1)
        return kept.gather(-1, back), some.gather(-1, back)

    def _experts(self, call: Call) -> Experts | None:
        """The module's experts, if the kernel knows their form: tried on the first visit, and again
        once somebody has wrapped or replaced something of it."""
        held: dict[str, Any] = call.known(dict, "experts")
        now = (look_of(call.site.module), torch.is_autocast_enabled(call.x.device.type))
        if held.get("look") != now:
            found = read_experts(call.site.module)
            if found is not None and call.routing is not None:
                down = found.arguments["down"]
                x, indices, weights = sample(call.x, *call.routing, len(down))
                true = call.plain(x, routing=(indices, weights))
                error = error_of(found, x, indices, weights, true)
                found = found if call.read(error)[0] <= 1.0 else None
            held.update(look=now, experts=found)
        return held["experts"]

    def keep(self, ranked: Tensor, limit: int | None, depth: int = 0) -> Tensor:
        """Which of the weights ``[T, k]``, greatest first, are kept in layer ``depth``: bools, the
        first ones of each row, at most ``limit``."""
        k = ranked.shape[1]
        ranked = ranked.float()
        place = torch.arange(k, device=ranked.device)
        share = ranked / ranked.sum(-1, keepdim=True).clamp(min=1e-30)
        before = share.cumsum(-1) - share
        kept = (place < (limit or k)).expand(ranked.shape)
        ratio, mass, floor = (_at(v, depth) for v in (self.ratio, self.mass, self.floor))
        if ratio is not None:
            kept = kept & (ranked >= ratio * ranked[:, :1])
        if mass is not None and mass < 1.0:
            kept = kept & (before < mass)
        if floor is not None:
            kept = kept & (ranked >= floor)
        count = kept.cumprod(-1).sum(-1, keepdim=True).clamp(min=min(self.min_experts, k))
        if self.max_dropped_mass is not None:
            # with s kept, 1 - before[s] is lost; the last bit of a sum must not ask for one more
            needed = (1.0 - before > self.max_dropped_mass + 1e-6).sum(-1, keepdim=True)
            count = torch.maximum(count, needed)
        return place < count

    def _weighed(
        self, call: Call, ranked: Tensor, kept: Tensor, total: Tensor, means: Tensor | None
    ) -> Tensor:
        some = ranked * kept
        return some if means is not None else self._renormalised(call, some, total)

    def _renormalised(self, call: Call, weights: Tensor, total: Tensor) -> Tensor:
        """Kept weights, with the sum that all had where the router normalises."""
        same = call.known(lambda: _sums.normalises(call), f"normalises {total.device}")
        if same is None:
            same = _sums.same(total)
        factor = total / weights.sum(-1, keepdim=True)
        return weights * torch.where(same & (total > 0), factor, torch.ones_like(factor))

    def _columns(
        self, call: Call, indices: Tensor, weights: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The first slots of a routing for the module's own forward, with a second one of weight 0
        where that needs two."""

        def one(*routing: Tensor) -> Any:
            return call.plain(call.x[:1], routing=routing)  # type: ignore[arg-type]

        if count == 1:
            count = call.known(lambda: least_slots(one, indices[:1], weights[:1]), "least")
        return indices[:, :count].contiguous(), weights[:, :count].contiguous()

    def _in_turn(
        self, call: Call, indices: Tensor, weights: Tensor, order: tuple[Tensor, ...]
    ) -> Any:
        """The module's own forward, on the tokens that keep ``n + 1`` slots: ``order[n]``."""
        out, slots = torch.empty_like(call.x), 0
        for n, some in enumerate(order, 1):
            if len(some):
                routing = self._columns(call, indices[some], weights[some], n)
                out[some] = call.plain(call.x[some], routing=routing)
                slots += routing[0].numel()
        flops = slot_flops(call.site.module)
        call.spare(flops * (indices.numel() - slots), flops * slots)
        return out

    def _skip(
        self, call: Call, experts: Experts, indices: Tensor, weights: Tensor, share: float
    ) -> Tensor:
        whole = slot_flops(call.site.module) * indices.numel()
        call.spare(whole * (1.0 - share), whole * share)
        with heard() as fallbacks:
            out = skip_experts(call.x, indices, weights, **experts.arguments)
        for op, reason in sorted(fallbacks):
            call.remark(f"expert_skip: {op} runs without its fast kernel: {reason}")
        return out


def _lost(weights: Tensor, kept: Tensor) -> Tensor:
    """The share of each token's mass ``[T, k]`` that is not kept, in float32 at least."""
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return 1.0 - ((wide * kept).sum(-1) / wide.sum(-1)).nan_to_num(1.0)


def _at(setting: T | tuple[T, ...], depth: int) -> T:
    """Of a layer; the last number holds for all that come after."""
    return setting[min(depth, len(setting) - 1)] if isinstance(setting, tuple) else setting


opaque_functions(globals())
