"""`enable`, `disable`, `active`: the way in and the way out."""

from __future__ import annotations

import fnmatch
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from accelerate_hooks import env
from accelerate_hooks.conflicts import check as check_conflicts
from accelerate_hooks.errors import AlreadyEnabledError, SpecError, UnsupportedModelError
from accelerate_hooks.frame import Root
from accelerate_hooks.listen import cache_context, follow_scheduler, loop, progress_bar
from accelerate_hooks.opaque import opaque_members
from accelerate_hooks.patch import Pipeline
from accelerate_hooks.policy import Policy
from accelerate_hooks.recipe import load_recipe
from accelerate_hooks.registry import patch_for, pipeline_of
from accelerate_hooks.seam import Override, Seam, seam_of
from accelerate_hooks.session import Session
from accelerate_hooks.site import Effect, Kind, Site
from accelerate_hooks.spec import Addressed, parse

_RISKY = frozenset({Effect.SKIP, Effect.RESHAPE})
Wanted = Policy | Addressed | str | os.PathLike[str]
_LIVE: weakref.WeakSet[Session] = weakref.WeakSet()


def enable(
    target: Any,
    policy: Wanted | Sequence[Wanted],
    *,
    only: str | None = None,
    strict: bool = True,
    audit: int | None = None,
) -> Session:
    """Let ``policy`` act on ``target`` until the session's ``disable()``.

    target: an ``nn.Module`` of transformers or diffusers, or a ``DiffusionPipeline``.
    policy: a `Policy`, a spec such as ``"lazy_step:preset=fast"``, the path of a recipe, or a list
        of these; the first in the list is the outermost. A ``Path`` is that of a recipe.
    only: a glob on site paths (``"transformer_blocks.*"``).
    strict: raise where a policy would do nothing; else say so in the report.
    audit: recompute one of ``audit`` skipped visits of each site beside the run, and report the
        true error; the output stays as it is, the time does not.

    Raises SpecError, RecipeError or ArtifactError for a wrong policy (SpecError for a wrong
    ``ACCELERATE_HOOKS_KERNELS``, too), UnsupportedModelError for a target without sites,
    PolicyConflictError, AlreadyEnabledError. The model is then untouched.
    """
    addressed = list(_addressed(policy, only))
    if not addressed:
        raise SpecError("no policy was given; accelerate_hooks.available_policies() lists them")
    if only is not None and type(only) is not str:
        raise SpecError(f"only={only!r} is a {type(only).__name__}; give a glob on site paths")
    if only == "":
        raise SpecError("only='' matches no path; give a glob on site paths, or leave it out")
    if audit is not None and (type(audit) is not int or audit < 1):
        raise SpecError(f"audit={audit!r} is out of range; give an integer of at least 1, or None")
    env.check_kernels()
    models = _models(target)
    for name, model in models.models.items():
        _refuse_enabled(name, model)
    if env.disabled():
        return _inert_session(models, addressed)
    roots = []
    for name, model in models.models.items():
        patch = patch_for(model)
        roots.append(Root(name, model, patch, patch.sites(model)))
    for item in addressed:
        for base in type(item.policy).__mro__[:-1]:
            opaque_members(base)
    notes = list(models.notes)
    plan = _plan(roots, addressed, strict, notes)
    check_conflicts(plan)
    _refuse_ranks(roots, addressed)
    session = Session(roots, addressed, plan, notes, audit)
    session.strict = strict
    session.pipeline = models.now
    for item in addressed:
        notes.extend(item.policy.check(session))
    _LIVE.add(session)
    try:
        for item in addressed:
            item.policy.install(session)
        _install(session, roots, plan, models)
    except BaseException:
        session.disable()
        raise
    return session


def disable(target: Any) -> None:
    """End the session that acts on ``target``, if there is one."""
    session = active(target)
    if session is not None:
        session.disable()


def active(target: Any) -> Session | None:
    """The session that acts on ``target``, on a part of it or on what it is a part of."""
    acting = (_acting(model) for model in _models(target).models.values())
    return next((found[1] for found in acting if found is not None), None)


def _acting(model: nn.Module) -> tuple[str, Session] | None:
    """The session that acts on a model, on a part of it or on what it is a part of, and where."""
    for path, module in model.named_modules():
        seam = seam_of(module)
        if seam is not None:
            return path, seam.session
    for session in list(_LIVE):
        if session.active and any(m is model for r in session.roots for m in r.model.modules()):
            return "", session
    return None


def _addressed(policy: Any, only: str | None) -> Iterable[Addressed]:
    if isinstance(policy, str):
        items: Iterable[Addressed] = parse(policy)
    elif isinstance(policy, os.PathLike):
        items = load_recipe(policy)
    elif isinstance(policy, Policy):
        items = [Addressed(policy, None)]
    elif isinstance(policy, Addressed):
        items = [policy]
    elif isinstance(policy, (list, tuple)):
        items = [a for p in policy for a in _addressed(p, None)]
    elif isinstance(policy, type) and issubclass(policy, Policy):
        raise SpecError(f"{policy.__name__} is a class; give an instance, {policy.__name__}()")
    else:
        raise SpecError(
            f"a policy is a Policy, a spec or a list of these, not {type(policy).__name__}"
        )
    for item in items:
        yield item if only is None or item.only is not None else Addressed(item.policy, only)


def _models(target: Any) -> Pipeline:
    if isinstance(target, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{type(target).__name__} runs outside Python, where nothing can be intercepted; give "
            "the model before torch.jit.script"
        )
    if isinstance(target, nn.Module):
        return Pipeline({"": _uncompiled(target)}, None)
    pipeline = pipeline_of(target)
    if pipeline is None:
        raise UnsupportedModelError(
            f"{type(target).__name__} is neither an nn.Module nor a DiffusionPipeline with a model "
            "that is given a timestep; give the model itself"
        )
    models: dict[str, nn.Module] = {}
    notes = list(pipeline.notes)
    for name, model in pipeline.models.items():
        module = _uncompiled(model)
        known = next((other for other, one in models.items() if one is module), None)
        if known is None:
            models[name] = module
        else:
            notes.append(f"{name} is the model that {known} is")
    return Pipeline(models, pipeline.scheduler, pipeline.now, notes)


def _uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile(model)`` wraps: its forward is what runs, compiled or not."""
    return getattr(model, "_orig_mod", model)


def _refuse_enabled(name: str, model: nn.Module) -> None:
    found = _acting(model)
    if found is not None:
        path, session = found
        where = ".".join(p for p in (name, path) if p) or type(model).__name__
        raise AlreadyEnabledError(
            f"{where} already carries {', '.join(p.name for p in session.policies)}; call "
            "disable() first, or enable both policies in one call as a list"
        )


def _refuse_ranks(roots: list[Root], addressed: list[Addressed]) -> None:
    """Ranks of a sharded model must agree on what to skip, or they wait for each other for ever."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() < 2:
        return
    deciding = [a.policy for a in addressed if a.policy.decides != "ahead"]
    for root in roots:
        sharded = any(hasattr(p, "device_mesh") for p in root.model.parameters()) or any(
            "FullyShardedDataParallel" in type(m).__name__ or "FSDPModule" in type(m).__name__
            for m in root.model.modules()
        )
        if sharded and deciding:
            raise UnsupportedModelError(
                f"{deciding[0].name} decides from data, and {type(root.model).__name__} is sharded "
                "over ranks that could decide otherwise; use settings that decide ahead of the "
                "data, or one model a rank"
            )


def _plan(
    roots: list[Root], addressed: list[Addressed], strict: bool, notes: list[str]
) -> dict[Site, list[tuple[int, Policy]]]:
    """Which policies act where, outermost first."""
    plan: dict[Site, list[tuple[int, Policy]]] = {}
    for root in roots:
        for site in root.sites:
            plan[site] = []
    for index, item in enumerate(addressed):
        count = 0
        for root in roots:
            for site in root.sites:
                path = ".".join(p for p in (root.name, site.path) if p)
                if item.only is not None and not (
                    fnmatch.fnmatchcase(path, item.only)
                    or fnmatch.fnmatchcase(site.path, item.only)
                ):
                    continue
                if site.kind not in item.policy.kinds:
                    continue
                effects = item.policy.acts(site)
                if effects & _RISKY and (why := root.patch.refuses(site)) is not None:
                    text = (
                        f"{item.policy.name} cannot act at {path} of {type(root.model).__name__}: "
                        f"{why}; choose other blocks with only=, or a policy for other kinds of "
                        "sites"
                    )
                    if strict:
                        raise UnsupportedModelError(text)
                    notes.append(text)
                elif effects:
                    plan[site].append((index, item.policy))
                    count += 1
        if count == 0:
            kinds = ", ".join(item.policy.kinds)
            names = ", ".join(type(root.model).__name__ for root in roots)
            where = f" matching {item.only!r}" if item.only is not None else ""
            text = (
                f"{item.policy.name} found no {kinds} site{where} in {names}; "
                "`accelerate-hooks inspect` lists the sites there are"
            )
            if strict:
                raise UnsupportedModelError(text)
            notes.append(text)
    return plan


def _install(
    session: Session,
    roots: list[Root],
    plan: dict[Site, list[tuple[int, Policy]]],
    models: Pipeline,
) -> None:
    ledger = session.ledger
    for root in roots:
        blocks = root.asks_blocks = any(s.kind == "block" and plan[s] for s in root.sites)
        seams: dict[tuple[nn.Module, Kind], list[Site]] = {}  # a module may be two kinds of site
        for site in root.sites:
            seams.setdefault((site.module, site.kind), []).append(site)
        for (module, kind), sites in seams.items():
            if kind == "loop":
                continue
            if module is root.model or (blocks and kind == "block") or any(plan[s] for s in sites):
                seam = Seam(session, sorted(sites, key=lambda s: s.visit))
                root.seams.append(seam)
                ledger.seam(seam)
        if hasattr(root.model, "cache_context"):
            ledger.override(Override(root.model, "cache_context", cache_context(session)))
        for site in root.sites:
            if plan[site] and site.kind == "attention":
                session.reach(site, root.patch.reach_attention(site, session))
            if plan[site] and site.kind == "loop":
                ledger.override(Override(root.model, site.path, loop(session, site)))
    if models.scheduler is not None:
        follow_scheduler(session, models.scheduler)
        if hasattr(models.now(), "progress_bar"):
            ledger.overhear(models.now(), {"progress_bar": progress_bar(session)})


def _inert_session(models: Pipeline, addressed: list[Addressed]) -> Session:
    session = Session([], addressed, {}, ["ACCELERATE_HOOKS=0: inert"])
    session.disable()
    return session
