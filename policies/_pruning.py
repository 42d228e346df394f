"""Fewer experts in a model: which go, by what criterion, and into which they are merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accelerate_hooks.artifact import Artifact
from accelerate_hooks.errors import ArtifactError, SpecError, UnsupportedModelError
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._routers import Plan, Renumbered
from accelerate_hooks.seam import Override
from accelerate_hooks.site import Site

Criterion = Literal["aimer", "frequency", "router_weight", "activation_norm", "reap"]


_ASKED = ("top_k", "num_experts_per_tok", "top_k_experts")


@dataclass(frozen=True, eq=False)
class Layer:
    """One mixture: its experts, their number, the router before them, and its place among the
    mixtures of the model."""

    experts: Site
    router: Site
    count: int
    place: int = 0

    @property
    def top_k(self) -> int | None:
        """How many of them a token asks, where the router or its config says it."""
        router = self.router.module
        for holder in (router, getattr(router, "config", None)):
            for name in _ASKED:
                found = getattr(holder, name, None)
                if isinstance(found, int):
                    return found
        return None

    def serves(self, kept: Tensor) -> bool:
        """Whether a token finds as many experts as it asks among ``kept`` ``[E']``, whichever
        groups of experts a router that limits it to a few of them (DeepSeek-V3) picks."""
        router = self.router.module
        groups, some = (getattr(router, name, None) for name in ("num_group", "topk_group"))
        if not isinstance(groups, int) or not isinstance(some, int) or self.count % groups:
            return True
        if getattr(router, "topk_method", None) == "greedy":  # DeepSeek-V2 can do without
            return True
        left = torch.bincount(kept // (self.count // groups), minlength=groups)
        return int(left.sort().values[:some].sum()) >= (self.top_k or 1)


def mixtures(sites: list[Site], policy: str = "expert_skip") -> list[Layer]:
    """The mixtures among ``sites``, in their order. Raises UnsupportedModelError where there is
    none, and where one has no router of its own, or experts that cannot be counted."""
    routers = [site for site in sites if site.kind == "router"]
    layers = []
    for site in sites:
        if site.kind != "experts":
            continue
        near = [r for r in routers if (r.stack, r.index) == (site.stack, site.index)]
        beside = [r for r in near if _parent(r.path) == _parent(site.path)]
        if len(beside or near) != 1:
            raise UnsupportedModelError(
                f"{policy}: pruning hides experts from their router, and {site.name} has "
                f"{len(near)} of them as modules that only= leaves it; use the rules that act at "
                "run time instead, or name the router too"
            )
        count = len(per_expert(site.module))
        layers.append(Layer(site, (beside or near)[0], count, len(layers)))
    if not layers:
        raise UnsupportedModelError(
            f"{policy}: there are routers here and no experts sites (their module is wrapped, or "
            "only= leaves it out), so nothing can be pruned; `accelerate-hooks inspect` lists the "
            "sites there are"
        )
    return layers


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all experts together, ``[E, ...]``, by name; empty where each expert is a
    module."""
    own = dict(module.named_parameters(recurse=False))
    sizes = {len(p) for p in own.values() if p.ndim == 3}
    return {n: p for n, p in own.items() if p.ndim >= 2} if len(sizes) == 1 else {}


def count_of(module: nn.Module) -> int:
    """How many experts a router may ask; LongCat's counts some that have no matrices."""
    together = [len(p) for p in module.parameters(recurse=False) if p.ndim == 3]
    return max(together) if together else len(per_expert(module))


def per_expert(module: nn.Module) -> list[list[Tensor]]:
    """The matrices of each expert, without biases."""
    together = [p for p in stacked(module).values() if p.ndim == 3]
    if together:
        return [[p[e] for p in together] for e in range(len(together[0]))]
    lists = [m for m in (module, *module.children()) if isinstance(m, nn.ModuleList)]
    if len(lists) == 1:
        return [[p for p in expert.parameters() if p.ndim >= 2] for expert in lists[0]]
    raise UnsupportedModelError(
        f"expert_skip: {type(module).__name__} keeps its experts in a form that is not known, so "
        "they are neither counted nor pruned; give the numbers of a rule yourself"
    )


def aimer(matrices: list[Tensor]) -> Tensor:
    """``mean |w| / sqrt(mean w^2)`` over all weights of an expert together, between 0 and 1, in
    float64: large where all weigh alike, small where few weigh most. The larger, the less an expert
    is missed (AIMER, arXiv 2603.18492)."""
    count = sum(m.numel() for m in matrices)
    absolute = torch.stack([m.float().abs().sum(dtype=torch.float64) for m in matrices]).sum()
    square = torch.stack([m.float().square().sum(dtype=torch.float64) for m in matrices]).sum()
    norm = (square / count).sqrt()
    return torch.where(norm > 0, absolute / count / norm, torch.zeros_like(norm))


def importance(layer: Layer) -> Tensor:
    """What `aimer` makes of each expert ``[E]``, the greater the more it is missed."""
    module = layer.experts.module
    changed = layer.experts.path.endswith(".base_layer") or any(
        hasattr(m, "parametrizations") for m in module.modules()
    )
    if changed:
        raise UnsupportedModelError(
            f"expert_skip: the weights of {layer.experts.name} are not what it computes with (an "
            "adapter, a parametrization); merge it first, or fit a criterion that looks at "
            "activations"
        )
    if not all(m.is_floating_point() and not m.is_meta for m in _flat(layer.experts.module)):
        raise UnsupportedModelError(
            f"expert_skip: the weights of {layer.experts.name} are quantised or offloaded; prune "
            "the full model on one device, or fit a criterion that looks at activations"
        )
    return torch.stack([-aimer(m) for m in per_expert(layer.experts.module)]).cpu()


def _flat(module: nn.Module) -> Iterator[Tensor]:
    return (m for matrices in per_expert(module) for m in matrices)


def removals(prune: float | tuple[int, ...], layers: list[Layer], mixtures: int) -> list[int]:
    """How many experts go in each layer: a share of each, rounded down, or a number for each of the
    model's ``mixtures``. Raises SpecError if a layer would keep fewer than a token asks."""
    if isinstance(prune, tuple) and len(prune) != mixtures:
        raise SpecError(
            f"expert_skip: prune has {len(prune)} numbers, this model {mixtures} mixtures; give "
            "one a mixture, or one share for all"
        )
    counts = [
        prune[x.place] if isinstance(prune, tuple) else int(prune * x.count + 1e-9) for x in layers
    ]
    for layer, count in zip(layers, counts, strict=True):
        least = layer.top_k or 1
        if not 0 <= count <= layer.count - least:
            raise SpecError(
                f"expert_skip: prune takes {count} of the {layer.count} experts of "
                f"{layer.experts.name}, and a token asks {least} of those that are left; take at "
                f"most {layer.count - least}, or set top_k lower as the model is loaded"
            )
    return counts


def survivors(scores: Tensor, removed: int) -> Tensor:
    """The experts that are left, in their order: all but the ``removed`` of least score."""
    return scores.argsort(stable=True)[removed:].sort().values


def nearest(layer: Layer, kept: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
    """A matrix ``[E', E]`` that averages each expert that goes into a survivor, by ``weight``
    ``[E]``.

    It goes to the survivor nearest in what the router looks for (cosine of the router's rows, else
    of the experts' matrices), and only to one of the worse half: the better half stays as it is
    (SlimQwen's partial preservation, arXiv 2605.08738).
    """
    vectors = _directions(layer)
    order = scores[kept].argsort(stable=True)
    worse = kept[order[: max(1, len(kept) // 2)]]
    place = {int(e): i for i, e in enumerate(kept.tolist())}
    matrix = torch.zeros(len(kept), layer.count, dtype=torch.float64, device="cpu")
    for e in range(layer.count):
        into = e if e in place else int(worse[(vectors[worse] @ vectors[e]).argmax()])
        matrix[place[into], e] = weight[e].double().clamp(min=1e-12)
    return matrix / matrix.sum(1, keepdim=True)


def _directions(layer: Layer) -> Tensor:
    rows: Any = getattr(layer.router.module, "weight", None)
    if isinstance(rows, Tensor) and rows.ndim == 2 and len(rows) == layer.count:
        return F.normalize(rows.detach().double().cpu(), dim=-1)
    flat = [
        torch.cat([m.detach().flatten() for m in matrices])
        for matrices in per_expert(layer.experts.module)
    ]
    return F.normalize(torch.stack(flat).double().cpu(), dim=-1)


def install(policy: Any, session: Any) -> None:
    """Tell every router what it may choose, and take out what shall be gone."""
    from accelerate_hooks.policies._surgery import shrink

    every = [s for root in session.roots for s in root.sites if s.kind == "experts"]
    acted = [s for s in session.sites if any(p is policy for _, p in session.policies_at(s))]
    layers = [replace(x, place=every.index(x.experts)) for x in mixtures(acted)]
    if policy.follows_matrices:
        plans = _matrices(policy, layers)
    else:
        plans = _plans(policy, layers, removals(policy.prune, layers, len(every)))
    freed = 0
    for layer, (kept, matrix, plan) in zip(layers, plans, strict=True):
        if policy.takes_out:
            freed += shrink(
                layer, kept if matrix is None else None, matrix, ledger=session.ledger,
                away=policy.free_memory, drop=policy.irreversible,
            )  # fmt: skip
            router = Override(layer.router.module, "forward", Renumbered(layer.router, plan))
            session.ledger.override(router)
            session.leave_out(layer.router)
        else:
            session.know(policy, layer.router, "plan", plan)
    session.notes.append(_said(policy, layers, plans, freed))


Chosen = tuple[Tensor | None, Tensor | None, Plan]


def _plans(policy: Any, layers: list[Layer], counts: list[int]) -> list[Chosen]:
    plans: list[Chosen] = []
    for layer, removed in zip(layers, counts, strict=True):
        scores = scores_of(policy, layer) if removed else torch.zeros(layer.count, device="cpu")
        kept = survivors(scores, removed)
        if not layer.serves(kept):
            raise SpecError(
                f"expert_skip: prune takes {removed} of the {layer.count} experts of "
                f"{layer.experts.name}, and some groups of them keep too few for a token, which "
                f"asks {layer.top_k or 1} of the groups that its router picks; take fewer there"
            )
        hidden = torch.ones(layer.count, dtype=torch.bool, device="cpu")
        hidden[kept] = False
        place = torch.zeros(layer.count, dtype=torch.int64, device="cpu")
        place[kept] = torch.arange(len(kept), device="cpu")
        matrix = None
        if policy.merge and removed:
            asked = _measured(policy, "frequency", layer)
            weight = torch.ones(layer.count, device="cpu") if asked is None else asked
            matrix = nearest(layer, kept, scores, weight)
        plans.append((kept, matrix, Plan(hidden, place if policy.takes_out else None)))
    return plans


def _matrices(policy: Any, layers: list[Layer]) -> list[Chosen]:
    """The plans of an artifact that brings matrices."""
    plans: list[Chosen] = []
    for layer in layers:
        i = layer.place
        merge, route = (of_mixture(policy.artifact, n, layer) for n in ("merge", "route"))
        if merge is None or route is None or merge.shape != route.shape or merge.ndim != 2:
            raise ArtifactError(
                f"expert_skip: the artifact has no matrices merge.{i} and route.{i} of one shape "
                f"[E', E] for {layer.experts.name}; it has to hold both for each mixture"
            )
        if merge.shape[1] != layer.count or len(merge) < (layer.top_k or 1):
            raise ArtifactError(
                f"expert_skip: merge.{i} is {tuple(merge.shape)}, and {layer.experts.name} has "
                f"{layer.count} experts of which a token asks {layer.top_k or 1}"
            )
        whole = merge.isfinite().all() and route.isfinite().all()
        if not whole or (route.sum(1) <= 0).any():
            raise ArtifactError(
                f"expert_skip: merge.{i} or route.{i} for {layer.experts.name} holds what is no "
                "number, or routes nothing to one of the new experts; make the matrices anew"
            )
        none = torch.zeros(layer.count, dtype=torch.bool, device="cpu")
        plans.append((None, merge, Plan(none, mix=route)))
    return plans


def scores_of(policy: Any, layer: Layer) -> Tensor:
    if policy.criterion == "aimer":
        return importance(layer)
    found = _measured(policy, policy.criterion, layer)
    if found is None or len(found) != layer.count:
        raise ArtifactError(
            f"expert_skip: criterion={policy.criterion!r} is measured on data, and the artifact "
            f"knows nothing of the {layer.count} experts of {layer.experts.name}; use what "
            f"ExpertSkip(prune=..., criterion={policy.criterion!r}).fit(model, data) returns, with "
            "data that reaches them"
        )
    return found


def _measured(policy: Any, criterion: str, layer: Layer) -> Tensor | None:
    return None if policy.artifact is None else of_mixture(policy.artifact, criterion, layer)


def of_mixture(artifact: Artifact, what: str, layer: Layer) -> Tensor | None:
    return of_site(artifact, what, layer.experts, layer.place)


def of_site(artifact: Artifact, what: str, site: Site, place: int) -> Tensor | None:
    """The tensor ``<what>.<i>`` of a mixture: i is its place in the ``layers`` that an artifact
    names, else its ``place`` in the model."""
    names = artifact.meta.get("layers")
    if names is not None:
        if site.path not in names:
            return None
        place = names.index(site.path)
    return artifact.tensors.get(f"{what}.{place}")


def _said(policy: Any, layers: list[Layer], plans: list[Chosen], freed: int) -> str:
    left = [
        int((~plan.hidden).sum()) if matrix is None else len(matrix) for _, matrix, plan in plans
    ]
    counts = str(left[0]) if len(set(left)) == 1 else f"{min(left)} to {max(left)}"
    by = "matrices" if policy.follows_matrices else policy.criterion
    text = (
        f"expert_skip: {counts} of {layers[0].count} experts left in {len(layers)} layers, by {by}"
    )
    if not policy.takes_out:
        return text + "; they are hidden from the router, and free no memory"
    where = (
        "deleted" if policy.irreversible else "kept on the CPU" if policy.free_memory else "kept"
    )
    on_cpu = all(p.device.type == "cpu" for layer in layers for p in _flat(layer.experts.module))
    if on_cpu and not policy.irreversible:
        where = "kept, so that no memory is free before irreversible=True deletes them"
    return (
        f"{text}, with gradients on and while paused, too; {freed / 1e6:.1f} MB of parameters "
        f"less, the originals are {where}"
    )


opaque_functions(globals())
