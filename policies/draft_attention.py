"""DraftAttention: block-sparse self-attention, its blocks chosen from a low-resolution map."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from accelerate_hooks.artifact import Artifact
from accelerate_hooks.attention import Attention
from accelerate_hooks.call import Call
from accelerate_hooks.errors import ArtifactError, SpecError, UnsupportedModelError
from accelerate_hooks.kernels import (
    attention_mass,
    block_sparse_attention,
    heard,
)
from accelerate_hooks.opaque import opaque_functions, uncompiled
from accelerate_hooks.policies._regions import Plan
from accelerate_hooks.policy import Decides, Policy
from accelerate_hooks.site import Effect, Kind, Site, TokenLayout

_FITTED = ("pool", "select", "sinks")
Prepared = tuple[Plan, Tensor, Tensor, Tensor, Tensor | None, float]


@dataclass(frozen=True, kw_only=True)
class DraftAttention(Policy):
    """Compute only the blocks of self-attention that a draft of it calls for.

    Queries and keys are averaged over regions of neighbouring tokens; with ``n_c`` the tokens of
    region ``c``,

        draft[r, c] = softmax_c(scale * mean(q of r) . mean(k of c) + log n_c)

    is an attention map of regions, whose greatest entries are the blocks of the real map that are
    computed; the others are left out of the softmax. Tokens are reordered so that a region is one
    block. Text, and special tokens, attend to and are attended by everything.

    sparsity: share of the blocks to leave out, of those between tokens of the grid.
    mass: in its place, the share of each row's draft to keep (``select="mass"``); what that leaves
        out follows from the data.
    select: ``"quantile"`` ranks all blocks of a head together, ``"row"`` those of each row.
    pool: the region as (frames, height, width), (height, width) or (tokens,); by default 128
        tokens, 8 x 16 in the plane where it is large enough, through time where it is not.
    dense_steps: denoising steps computed in full, from the first on: a share of the steps if under
        1 (nothing where a bare loop does not say how many there are), else a number.
    dense_blocks: attention layers computed in full, from the first on.
    heads: ``"equal"`` densities, or an artifact of `fit` with one for each head and layer.
    sinks: leading blocks that every row keeps (the first tokens of a text).
    grid, text: the layout of the tokens, (frames, height, width) and where text stands in a joint
        sequence, for a model whose family is not known.

    Attention to another sequence, decoding steps, and attention with a window, sinks, a soft cap or
    a mask that is more than a bool a key (padding) are computed in full; the report says so.

    Source: DraftAttention (arXiv 2505.14708). Not theirs: the diagonal block is always kept, so
    that no query is left without keys; forced blocks count as chosen, so that the sparsity is the
    one asked for; pooling through time; budgets a head (MoA, arXiv 2406.14909).
    """

    name: ClassVar[str] = "draft_attention"

    sparsity: float = 0.75
    mass: float | None = None
    select: Literal["quantile", "row", "mass"] = "quantile"
    pool: tuple[int, ...] | None = None
    dense_steps: float = 0.25
    dense_blocks: int = 1
    heads: Literal["equal"] | Artifact = "equal"
    sinks: int = 0
    grid: tuple[int, ...] | None = None
    text: Literal["none", "first", "last"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sparsity", 0.0 <= self.sparsity < 1.0, "0 <= sparsity < 1")
        self.require("mass", self.mass is None or 0.0 < self.mass <= 1.0, "0 < mass <= 1")
        ok = (self.mass is not None) == (self.select == "mass")
        self.require("select", ok, "'mass' together with mass=, 'quantile' or 'row' without")
        for name in ("pool", "grid"):
            sizes = getattr(self, name)
            ok = sizes is None or (1 <= len(sizes) <= 3 and all(size > 0 for size in sizes))
            self.require(name, ok, "one to three positive sizes")
        whole = self.dense_steps < 1 or float(self.dense_steps).is_integer()
        ok = self.dense_steps >= 0 and whole
        self.require("dense_steps", ok, "a share under 1, or a whole number of steps")
        self.require("dense_blocks", self.dense_blocks >= 0, "an integer >= 0")
        self.require("sinks", self.sinks >= 0, "an integer >= 0")
        ok = self.text == "none" or self.grid is not None
        self.require("text", ok, "grid=, too")
        ok = self.heads == "equal" or self.mass is None
        self.require("heads", ok, "'equal' with mass=: budgets are densities")

    # -- settings ----------------------------------------------------------------------------

    @classmethod
    def exact(cls) -> Self:
        return cls(sparsity=0.0)

    @classmethod
    def example(cls) -> Self:
        return cls(sparsity=0.5, pool=(1, 2, 2), dense_steps=0, dense_blocks=0)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("attention",)

    @property
    def decides(self) -> Decides:
        return "ahead" if self.mass is None else "site"

    def acts(self, site: Site) -> frozenset[Effect]:
        return frozenset({Effect.REPLACE})

    def check(self, session: Any) -> list[str]:
        for root in session.roots:
            if self.grid is None and not session.knows_layout(root):
                raise UnsupportedModelError(
                    f"draft_attention: nobody says where the tokens of "
                    f"{type(root.model).__name__} stand; give grid=(frames, height, width), in "
                    "tokens, and text='first' or 'last' if text is in the same sequence"
                )
            if isinstance(self.heads, Artifact):
                self.heads.check(policy=self.name, model=root.model)
                self._check_densities(self.heads)
        return []

    def _check_densities(self, heads: Artifact) -> None:
        for name, value in heads.meta.get("settings", {}).items():
            now = json.loads(json.dumps(getattr(self, name, None)))
            if now != value:
                raise ArtifactError(
                    f"draft_attention: these densities were fitted with {name}={value!r}, not "
                    f"{now!r}; use that, or fit again"
                )
        for name, shares in heads.tensors.items():
            if shares.ndim != 1 or not ((shares >= 0) & (shares <= 1)).all():
                raise ArtifactError(
                    f"draft_attention: the densities of {name} are no numbers from 0 to 1, one a "
                    "head; fit again"
                )

    def fit(
        self,
        model: Any,
        data: Any,
        *,
        target: float | None = None,
        resume: str | None = None,
        progress: bool = True,
        visits: int = 4,
    ) -> Self:
        """Give every head of every layer a density of its own, so that all together keep the most
        attention mass at a mean density of ``target`` (by default ``1 - sparsity``), over the
        layers and steps that ``dense_blocks`` and ``dense_steps`` leave; as there, of the blocks
        that may be left out. Raises SpecError where those kept by name are more.

        data: keyword arguments of a few calls of the model or pipeline.
        resume: a file that keeps what was measured, so that a killed fit goes on from there.
        visits: how many steps of a call are measured, evenly spread; each costs dense scores.

        Returns a policy whose ``heads`` is an artifact; ``heads.save(path)`` keeps it.
        """
        from accelerate_hooks.policies import _budgets

        share = 1.0 - self.sparsity if target is None else target
        least = _budgets.GRID[0]
        number = isinstance(share, (int, float)) and type(share) is not bool  # pyright: ignore[reportUnnecessaryIsInstance]
        if self.mass is not None or not number or not least <= share < 1.0:
            raise SpecError(
                f"draft_attention: cannot fit densities to target={target!r} (a density of "
                f"{share!r}) with mass={self.mass}; give {least} <= target < 1, and mass=None"
            )
        curves = _budgets.measure(
            self, model, data, visits=visits, resume=resume, progress=progress
        )
        budgets, kept = _budgets.allocate(curves, share)
        artifact = Artifact.create(
            budgets, policy=self.name, model=_budgets.model_of(model), density=share,
            settings={name: getattr(self, name) for name in _FITTED}, **kept,
        )  # fmt: skip
        return replace(self, heads=artifact)

    # -- one visit ---------------------------------------------------------------------------

    def around(self, call: Call) -> Any:
        why = "sparsity=0" if self.sparsity == 0.0 and self.mass is None else self.dense(call)
        if why is not None:
            call.note(why)
            return call.proceed()
        told: list[dict[str, float]] = []
        out = call.attention(lambda attention: self._attend(call, attention, told))
        if told:
            call.note("draft", **_together(told))
        return out

    def dense(self, call: Call) -> str | None:
        """Why this visit is computed in full, whatever is attended to in it, or None."""
        step = call.step
        if step.phase == "decode":
            return "one token attends"
        if step.phase == "denoise" and self.dense_steps:
            count: float | None = self.dense_steps
            if self.dense_steps < 1:
                if step.total is None:
                    call.remark(
                        f"draft_attention: dense_steps={self.dense_steps} is a share of steps, "
                        "and nobody says how many there are, so none is dense; use "
                        "session.run(total=...)"
                    )
                count = (
                    None if step.total is None else math.ceil(self.dense_steps * step.total - 1e-9)
                )
            if count is not None and step.index < count:
                return "one of the first steps"
        return None

    @uncompiled
    def _attend(self, call: Call, a: Attention, told: list[dict[str, float]]) -> Tensor:
        clock = _Clock(a.q)
        prepared = self.prepare(call, a)
        if prepared is None:
            return a.default()
        plan, q, k, v, seen, scale = prepared
        clock.lap("reorder_ms")
        with call.beside():
            draft = self.draft(call, plan, q, k, scale, seen)
        clock.lap("draft_ms")
        share = self._share(call, a)
        mask = plan.selection.choose(draft, share)
        clock.lap("select_ms")
        with heard() as fallbacks:
            out = block_sparse_attention(
                q, k, v, mask, block_size=plan.block, is_causal=a.is_causal, scale=scale,
                enable_gqa=a.groups > 1, key_mask=seen,
            )  # fmt: skip
        clock.lap("kernel_ms")
        out = plan.restore(out)
        clock.lap("reorder_ms")
        for op, reason in sorted(fallbacks):
            call.remark(f"draft_attention: {op} runs without its fast kernel: {reason}")
        density = self._density(call, plan)
        if density is None:
            density = call.read(mask.float().mean())[0] / plan.visible
        extra = 2.0 * draft.numel() * q.shape[-1]  # the draft's own product is work, too
        call.spare(a.flops * (1.0 - density) - extra, a.flops * density + extra)
        numbers = {"density": density, **clock.numbers}
        if call.audited():
            with call.beside():
                call.error(out, a.default())
                true = attention_mass(
                    q, k, plan.block, scale=scale, is_causal=a.is_causal, key_mask=seen
                )
                numbers["mass_kept"] = call.read(plan.kept(true, mask, seen).mean())[0]
        told.append(numbers)
        return out

    def prepare(self, call: Call, a: Attention) -> Prepared | None:
        """Plan, reordered q, k, v and key mask, and the scale; None where an attention is to be
        computed in full (the reason is noted)."""
        seen, why = _key_mask(a)
        why = "attention to another sequence" if a.is_cross else why or _unfit(a)
        if why is not None:
            self._pass_over(call, why)
            return None
        plan = self._plan(call, a)
        if plan.rows < 2:
            self._pass_over(call, f"a single block of {plan.block} tokens")
            return None
        if self.dense_blocks and self._layer(call) < self.dense_blocks:
            call.note("one of the first layers")
            return None
        q, k, v = (plan.reorder(t) for t in _cast(a.q, a.k, a.v))
        seen = None if seen is None else plan.reorder(seen, 1)
        return plan, q, k, v, seen, 1.0 / math.sqrt(a.q.shape[-1]) if a.scale is None else a.scale

    def _pass_over(self, call: Call, why: str) -> None:
        """This attention is none of the layers that are counted."""
        call.note(why)
        call.slot(dict, scope="run")["passed over", call.site.path] = True

    def _layer(self, call: Call) -> int:
        """How many layers of self-attention come before this one, whatever only= leaves out: the
        modules around attentions that are not known to be passed over."""
        known: dict[Any, Any] = call.slot(dict, scope="run")
        key = ("layer", call.site.path)
        if key not in known:
            before = [p for p in call.before if ("passed over", p) not in known]
            known[key] = len({p.rpartition(".")[0] for p in (*before, call.site.path)}) - 1
        return known[key]

    def draft(
        self, call: Call, plan: Plan, q: Tensor, k: Tensor, scale: float, seen: Tensor | None
    ) -> Tensor:
        """Scores ``[B, heads, R, R]`` of the blocks of reordered ``q`` and ``k`` (``seen``
        ``[B, N]`` is False at padding): the greatest are computed. A subclass may rank them
        otherwise."""
        return plan.draft(q, k, scale, seen)

    def _share(self, call: Call, a: Attention) -> float | Tensor:
        if isinstance(self.heads, Artifact):
            budgets: dict[Any, Tensor] = call.slot(dict, scope="run")
            key = ("budget", call.site.name, a.q.device)
            if key not in budgets:
                budgets[key] = _budget(self.heads, call, a.q.shape[1]).to(a.q.device)
            return budgets[key]
        return 1.0 - self.sparsity if self.mass is None else self.mass

    def _density(self, call: Call, plan: Plan) -> float | None:
        """The share of visible blocks that is computed; None where that follows from the data."""
        if self.mass is not None:
            return None
        known: dict[Any, float | None] = call.slot(dict, scope="site")
        if plan not in known:
            shares = [1.0 - self.sparsity]
            if isinstance(self.heads, Artifact):
                shares = _budget(self.heads, call, None).tolist()
            found = [plan.selection.density(share) or 0.0 for share in shares]
            known[plan] = sum(found) / len(found)
        return known[plan]

    def _plan(self, call: Call, a: Attention) -> Plan:
        """Order and selection for the tokens at hand: made once a run and resolution."""
        tokens, device = a.q.shape[2], a.q.device
        plans: dict[Any, Plan] = call.slot(dict, scope="run")
        layout = self._layout(call, a)
        key = (repr(layout), tokens, device, a.is_causal)
        if key not in plans:
            plans[key] = Plan.of(
                layout, tokens, device, pool=self.pool, rule=self.select,
                sinks=self.sinks, causal=a.is_causal,
            )  # fmt: skip
        return plans[key]

    def _layout(self, call: Call, a: Attention) -> TokenLayout:
        tokens = a.q.shape[2]
        layout = a.layout
        if self.grid is not None:
            grid = (*(1 for _ in range(3 - len(self.grid))), *self.grid)
            more = tokens - math.prod(grid)
            text = {"none": None, "first": slice(0, more), "last": slice(tokens - more, tokens)}
            layout = TokenLayout(*grid, text[self.text])
            fits = more >= 0 if self.text != "none" else more == 0 or math.prod(grid[:2]) > 1
            found = layout.at(tokens) if fits else None
        else:
            found = None if layout is None else layout.at(tokens)
        if found is None:
            says = "no layout" if layout is None else f"{layout.grid}, text {layout.text}"
            raise UnsupportedModelError(
                f"{call.site.name}: its attention has {tokens} tokens, where the layout is {says}; "
                "give grid=(frames, height, width) and text=, or leave this site out with only="
            )
        return found


def _budget(heads: Artifact, call: Call, count: int | None) -> Tensor:
    """The fitted densities ``[heads]`` of this layer, which has ``count`` heads."""
    found = heads.tensors.get(call.site.name)
    if found is None or count not in (None, len(found)):
        has = "no densities" if found is None else f"{len(found)} densities"
        raise ArtifactError(
            f"draft_attention: the artifact has {has} for the {count} heads of {call.site.name}; "
            "fit again on calls that reach it, or leave it out with only="
        )
    return found.double()


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that autocast would give them, as PyTorch's own attention does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _key_mask(a: Attention) -> tuple[Tensor | None, str | None]:
    """The keys that may be seen ``[B or 1, M]``, if there is a mask; or why it is none of keys."""
    mask = a.mask
    if mask is None:
        return None, None
    if mask.dtype != torch.bool:
        return None, "an attention mask that is added to the scores"
    mask = mask[(None,) * (4 - mask.ndim)]
    if any(mask.shape[axis] > 1 and mask.stride(axis) for axis in (1, 2)):
        return None, "an attention mask [queries, keys]"
    return mask[:, 0, 0].expand(-1, a.k.shape[2]), None


def _unfit(a: Attention) -> str | None:
    """Why an attention is computed in full, or None."""
    if a.extra:
        return f"attention with {', '.join(sorted(a.extra))}"
    if a.q.shape[2] != a.k.shape[2]:
        return "queries and keys of other lengths"
    if a.q.ndim != 4 or a.v.shape[-1] != a.q.shape[-1]:
        return "heads of another form"
    return None


def _together(told: list[dict[str, float]]) -> dict[str, float]:
    """The numbers of the attentions of one visit: their times, the means of what else there is."""
    sums = {name: sum(numbers[name] for numbers in told) for name in told[0]}
    return {n: v if n.endswith("_ms") else v / len(told) for n, v in sums.items()}


class _Clock:
    """Milliseconds by part; on an accelerator, where the host runs ahead, none."""

    def __init__(self, like: Tensor) -> None:
        self.on = like.device.type == "cpu"
        self.numbers: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.on:
            now = time.perf_counter()
            self.numbers[name] = self.numbers.get(name, 0.0) + (now - self.last) * 1e3
            self.last = now


opaque_functions(globals())
