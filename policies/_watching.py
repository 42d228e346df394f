"""What the experts of a model do on some data: who is asked, how much each gives, and what leaving
slots out would cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from accelerate_hooks.call import Call
from accelerate_hooks.enable import enable
from accelerate_hooks.errors import SpecError, UnsupportedModelError
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._experts import each_slot, least_slots
from accelerate_hooks.policies._pruning import count_of
from accelerate_hooks.policies._sums import normalises, same
from accelerate_hooks.policy import Policy
from accelerate_hooks.site import Effect, Kind, Site

GRID = tuple(i / 64 for i in range(65))
"""Thresholds that are tried."""

_TOKENS = 2048  # whose outputs, a slot each, are held at a time


@dataclass
class Seen:
    """Of one layer, sums over tokens; `[E]` by expert and `[settings]` by rule.

    asked: how often; weight: of the router; norm: of the expert's output; both: their product.
    given: the sum of the expert's outputs ``[E, H]``.
    kept, error: a rule's number of experts, and the square of what leaving out the others changes,
    as a share of that of the token in the residual stream (in the output where there is none).
    """

    tokens: float
    asked: Tensor
    weight: Tensor
    norm: Tensor
    both: Tensor
    given: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)
    error: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: Seen) -> None:
        for name in ("tokens", "asked", "weight", "norm", "both", "given"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.kept, other.kept), (self.error, other.error)):
            for rule, values in theirs.items():
                mine[rule] = mine[rule] + values

    def means(self) -> Tensor:
        """What each expert gives on average ``[E, H]``."""
        return self.given / self.asked.clamp(min=1).unsqueeze(1)

    def scores(self) -> dict[str, Tensor]:
        """Of each expert ``[E]``, the greater the more it is missed: how often it is asked; the
        mean weight over all tokens; the sum of its outputs' norms (EAN); the mean of weight times
        norm over those that ask it (REAP, arXiv 2510.13999)."""
        return {
            "frequency": self.asked / self.tokens,
            "router_weight": self.weight / self.tokens,
            "activation_norm": self.norm / self.tokens,
            "reap": self.both / self.asked.clamp(min=1),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch(Policy):
    """Looks at experts as ``policy`` would leave them out by ``rule``, and computes all."""

    name: ClassVar[str] = "expert_skip_watch"
    policy: Any = None
    rule: str | None = None
    seen: dict[str, Seen] = field(default_factory=dict)
    real: dict[str, Tensor | None] = field(default_factory=dict)  # the tokens that are no padding

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("experts", "block")

    @classmethod
    def exact(cls) -> Self:
        return cls()

    example = exact

    def acts(self, site: Site) -> frozenset[Effect]:
        wanted = site.kind == "experts" or "experts" in site.parts
        return frozenset({Effect.OBSERVE}) if wanted else frozenset()

    def around(self, call: Call) -> Any:
        if call.site.kind == "block":
            stream: dict[str, Tensor] = call.slot(dict, scope="run")
            stream["x"] = call.x.detach()
            return call.proceed()
        if call.routing is None or call.routing[0].ndim != 2:
            raise UnsupportedModelError(
                f"expert_skip: fit sees what experts do where they are given indices and weights "
                f"[tokens, k], and {call.site.name} ({type(call.site.module).__name__}) is not; "
                "give the numbers yourself"
            )
        self._look(call, *call.routing, call.slot(dict, scope="run").get("x"))
        return call.proceed()

    def _look(self, call: Call, indices: Tensor, weights: Tensor, stream: Tensor | None) -> None:
        def run(*routing: Tensor) -> Tensor:
            return call.plain(routing=routing)  # type: ignore[arg-type]

        least = call.known(lambda: least_slots(run, indices, weights), "least")
        ys = each_slot(run, indices, weights, least)
        count = call.known(lambda: count_of(call.site.module))
        if stream is not None:
            stream = stream.flatten(0, -2) if stream.numel() == ys[:, 0].numel() else None
        real = self.real.get("tokens")
        if real is not None and real.numel() == len(indices):
            some = real.flatten().bool().to(indices.device)
            ys, indices, weights = ys[some], indices[some], weights[some]
            stream = None if stream is None else stream[some]
        if not len(indices):
            return
        one_sum = self.rule is not None and call.known(lambda: _same(call), "normalises")
        seen = look(self.policy, self.rule, ys, indices, weights, count, stream, one_sum)
        name = call.site.path
        if name in self.seen:
            self.seen[name].add(seen)
        else:
            self.seen[name] = seen


def _same(call: Call) -> bool:
    found = normalises(call)
    return bool(same(call.routing[1].sum(-1)) if found is None else found)  # type: ignore[index]


def look(
    policy: Any, rule: str | None, ys: Tensor, indices: Tensor, weights: Tensor, count: int,
    stream: Tensor | None = None, normalised: bool = False,
) -> Seen:  # fmt: skip
    """``ys`` ``[T, k, H]``: what each slot's expert gives, at weight 1; ``stream`` ``[T, H]``; and
    whether the kept weights get the sum that all had."""
    asked = torch.zeros(count, dtype=torch.float64, device="cpu")
    sums = {"weight": asked.clone(), "norm": asked.clone(), "both": asked.clone()}
    valid = (indices >= 0) & (indices < count)
    places, w = indices[valid].cpu(), weights[valid].double().cpu()
    norm = ys.float().norm(dim=-1)[valid].double().cpu()
    asked.index_add_(0, places, torch.ones_like(w))
    for name, values in (("weight", w), ("norm", norm), ("both", w * norm)):
        sums[name].index_add_(0, places, values)
    given = torch.zeros(count, ys.shape[-1], dtype=torch.float32, device="cpu")
    given.index_add_(0, places, ys[valid].float().cpu())
    seen = Seen(float(len(ys)), asked, **sums, given=given)
    if rule is not None:
        whole = torch.einsum("tkh,tk->th", ys.float(), weights.float())
        size = (whole if stream is None else stream).double().square().sum(-1).clamp(min=1e-30)
        settings = thresholds(rule, indices.shape[1])
        order = weights.float().argsort(dim=-1, descending=True, stable=True)
        ranked = weights.float().gather(1, order)
        total = ranked.sum(-1, keepdim=True)
        kept, error = [], []
        for value in settings:
            mask = policy.with_rule(rule, value).keep(ranked, value if rule == "top_k" else None)
            some = ranked * mask
            if normalised:
                some = some * (total / some.sum(-1, keepdim=True))
            change = torch.zeros_like(ranked).scatter(1, order, ranked - some)
            parts = zip(*(t.split(_TOKENS) for t in (ys, change, size)), strict=True)
            lost = [
                (torch.einsum("tkh,tk->th", y.float(), c).double().square().sum(-1) / s).sum()
                for y, c, s in parts
            ]
            kept.append(mask.sum(dtype=torch.float64).item())
            error.append(sum(lost, torch.zeros((), device="cpu")).item())
        seen.kept[rule] = torch.tensor(kept, dtype=torch.float64, device="cpu")
        seen.error[rule] = torch.tensor(error, dtype=torch.float64, device="cpu")
    return seen


def thresholds(rule: str, k: int) -> Sequence[Any]:
    """The settings of a rule that are tried, from the fewest experts to all."""
    if rule == "top_k":
        return range(1, k + 1)
    return GRID[1:] if rule == "mass" else GRID[::-1]


def watch(
    policy: Any, model: nn.Module, data: Any, rule: str | None, progress: bool
) -> dict[str, Seen]:
    """What `Watch` sees over the calls of ``data``, by the path of the site."""
    from tqdm import tqdm

    items = calls(data)
    seen: dict[str, Seen] = {}
    watching = Watch(policy=policy, rule=rule, seen=seen)
    with enable(model, watching) as session, torch.no_grad():
        if any(root.model.training for root in session.roots):
            raise SpecError("expert_skip: the model is in training mode; call model.eval() to fit")
        for item in tqdm(items, desc="experts", disable=not progress):
            watching.real["tokens"] = tokens_of(item)
            forward(model, item)
    if not seen:
        raise SpecError("expert_skip: no experts were asked on this data")
    return seen


def calls(data: Any) -> list[Any]:
    """The calls of the model that ``data`` is: keyword arguments or token ids, of one or several.
    Raises SpecError for what is neither, and for none."""
    alone = isinstance(data, (Mapping, Tensor)) or not isinstance(data, Iterable)
    items = [data] if alone else list(data)
    if not items:
        raise SpecError("expert_skip: fit needs at least one item in data")
    for item in items:
        if not isinstance(item, (Mapping, Tensor)):
            raise SpecError(
                f"expert_skip: data to fit on is keyword arguments of the model or token ids "
                f"[batch, tokens], of one call or a list of calls, not {type(item).__name__}"
            )
    return [i.unsqueeze(0) if isinstance(i, Tensor) and i.ndim == 1 else i for i in items]


def tokens_of(item: Any) -> Tensor | None:
    """Which tokens ``[batch, tokens]`` of a call are no padding, where it says so."""
    mask = item.get("attention_mask") if isinstance(item, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def forward(model: nn.Module, item: Any) -> Any:
    """One call: ``item`` is keyword arguments, or the token ids themselves."""
    return model(**item) if isinstance(item, Mapping) else model(item)


opaque_functions(globals())
