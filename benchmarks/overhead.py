"""The price of the runtime where nothing is skipped, beside peers in the same process.

    overhead.py            # two threads; writes benchmarks/results/overhead.json and .md

Four figures: an inert seam (a session that was disabled under a wrapper); a visit of a block that
does nothing; the time that a real forward of `DiTTransformer2DModel` 12 x 384 with 256 tokens
spends in our seams and not in the modules under them, read by clocks on both sides of each seam
(so the noise of 120 ms of matrix products is not in it); and the whole forward under policies that
never skip, beside diffusers' FirstBlockCache at threshold 0 and cache-dit's DBCache at threshold 0,
as medians of interleaved pairs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import timeit
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import nn

import accelerate_hooks as ah
from accelerate_hooks.policies import LazyStep
from accelerate_hooks.seam import Seam
from accelerate_hooks.site import Port, Site

RESULTS = Path(__file__).parent / "results"
LIMIT_IQR = 0.15


@dataclass(frozen=True, kw_only=True)
class Proceed(ah.Policy):
    """Asked everywhere, skips nothing."""

    name: ClassVar[str] = "proceed"
    kinds = ("model", "block", "attention", "mlp")

    def acts(self, site: Site) -> frozenset[ah.Effect]:
        return frozenset({ah.Effect.OBSERVE})


def dit() -> nn.Module:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, num_layers=12,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model.eval()


class Loop:
    """Forwards of one denoising run: time moves on, the labels stay."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        self.labels = torch.tensor([1])
        self.time = 1000

    def forward(self) -> float:
        self.time = self.time - 1 if self.time > 1 else 999
        moment = torch.tensor([self.time])
        start = time.perf_counter()
        self.model(self.x, moment, class_labels=self.labels, return_dict=False)
        return time.perf_counter() - start


@contextmanager
def ours(model: nn.Module, policy: ah.Policy) -> Any:
    with ah.enable(model, policy) as session:
        yield session


@contextmanager
def first_block_cache(model: nn.Module) -> Any:
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))
    _set_cache_context(model, CacheContext("cond"))
    try:
        yield None
    finally:
        for module in model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if isinstance(registry, HookRegistry):
                for name in list(registry.hooks):
                    registry.remove_hook(name)


@contextmanager
def cache_dit_db(model: nn.Module) -> Any:
    import cache_dit
    from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern
    from cache_dit.caching.cache_blocks import CachedBlocks_Pattern_3_4_5 as CachedBlocks

    adapter = BlockAdapter(
        transformer=model, blocks=[model.transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_3], check_forward_pattern=False,
    )  # fmt: skip
    config = DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.0,
        max_warmup_steps=0, num_inference_steps=100000,
    )  # fmt: skip
    first = model.transformer_blocks[0]
    cache_dit.enable_cache(adapter, cache_config=config)
    # DiT asks its first block for an embedding, which the peer's stand-in for the blocks lacks.
    CachedBlocks.norm1 = property(lambda self: first.norm1)
    try:
        yield None
    finally:
        cache_dit.disable_cache(adapter)


def own() -> dict[str, Callable[[nn.Module], Any]]:
    return {
        "seams on every block, attention and MLP": lambda m: ours(m, Proceed()),
        "LazyStep(scope=model), never skips": lambda m: ours(m, LazyStep(max_age=0)),
        "LazyStep(scope=stack), never skips": lambda m: ours(m, LazyStep(scope="stack", max_age=0)),
    }


def peers() -> dict[str, Callable[[nn.Module], Any]]:
    return {
        "diffusers FirstBlockCache, threshold 0": first_block_cache,
        "cache-dit DBCache, threshold 0": cache_dit_db,
    }


class Paused:
    """The same model, computing plainly."""

    def __init__(self, loop: Loop, session: Any) -> None:
        self.loop, self.session = loop, session

    def forward(self) -> float:
        with self.session.paused():
            return self.loop.forward()


class Clocks:
    """Clocks around each seam of a model and around what the seam calls."""

    def __init__(self, model: nn.Module) -> None:
        self.outside = self.inside = 0.0
        self.visits = 0
        self.seams = [
            seam
            for module in model.modules()
            if isinstance(seam := vars(module).get("forward"), Seam)
        ]

    def _outer(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.outside += time.perf_counter() - start
            self.visits += 1
            return result

        return forward

    def _inner(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.inside += time.perf_counter() - start
            return result

        return forward

    @contextmanager
    def running(self) -> Any:
        before = [seam.original for seam in self.seams]
        for seam in self.seams:
            seam.original = self._inner(seam.original)
            vars(seam.owner)["forward"] = self._outer(seam)
        try:
            yield self
        finally:
            for seam, original in zip(self.seams, before, strict=True):
                seam.original = original
                vars(seam.owner)["forward"] = seam


def in_place(rounds: int) -> dict[str, Any]:
    """Of our contestants: microseconds a forward in the seams, and a visit; medians."""
    rows = {}
    for name, enter in own().items():
        loop = Loop(dit())
        with torch.no_grad(), enter(loop.model):
            for _ in range(3):
                loop.forward()
            spent, share, clocks = [], [], Clocks(loop.model)
            with clocks.running():
                for _ in range(rounds):
                    clocks.outside = clocks.inside = clocks.visits = 0
                    whole = loop.forward()
                    spent.append(clocks.outside - clocks.inside)
                    share.append(spent[-1] / whole)
            quartiles = statistics.quantiles(spent, n=4)
            rows[name] = {
                "forward_us": statistics.median(spent) * 1e6,
                "iqr_us": (quartiles[2] - quartiles[0]) * 1e6,
                "visits": clocks.visits,
                "visit_us": statistics.median(spent) / clocks.visits * 1e6,
                "share": statistics.median(share),
            }
    return rows


def forwards(rounds: int) -> dict[str, Any]:
    """Interleaved forwards, in pairs with the plain model, in one process."""
    plain = Loop(dit())
    made: dict[str, Loop] = {}
    sessions: dict[str, Any] = {}
    failed: dict[str, str] = {}
    visits: dict[str, int] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, enter in (own() | peers()).items():
            loop = Loop(dit())
            try:
                session = stack.enter_context(enter(loop.model))
                for _ in range(3):
                    loop.forward()
            except Exception as error:  # a peer's own failure is a result, not ours
                failed[name] = f"{type(error).__name__}: {error}"[:200]
                continue
            made[name], sessions[name] = loop, session
            if session is not None:
                before = sum(r.computed for r in session.records.values())
                loop.forward()
                visits[name] = sum(r.computed for r in session.records.values()) - before
        for _ in range(3):
            plain.forward()
        times: dict[str, list[float]] = {name: [] for name in made}
        base: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(rounds):
            for name, loop in made.items():
                # Ours against itself, paused: copies of the weights differ by several percent.
                bare = plain if sessions[name] is None else Paused(loop, sessions[name])
                pair = [(base[name], bare), (times[name], loop)]
                for taken, one in pair if turn % 2 else pair[::-1]:
                    taken.append(one.forward())
    every = [t for taken in base.values() for t in taken]
    quartiles = statistics.quantiles(every, n=4)
    rows = {}
    for name in made:
        ratios = [t / b for t, b in zip(times[name], base[name], strict=True)]
        extra = [t - b for t, b in zip(times[name], base[name], strict=True)]
        rows[name] = {
            "ratio": statistics.median(ratios),
            "floor_ratio": min(times[name]) / min(base[name]),
            "extra_us": statistics.median(extra) * 1e6,
            "visits": visits.get(name),
        }
    return {
        "plain_ms": statistics.median(every) * 1e3,
        "plain_iqr": (quartiles[2] - quartiles[0]) / statistics.median(every),
        "rounds": rounds,
        "rows": rows,
        "failed": failed,
    }


class _Tiny(nn.Module):
    """Blocks that do next to nothing, so that a visit's own price shows."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1)
            self.norm = nn.LayerNorm(4)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(blocks))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def per_visit(blocks: int = 100, rounds: int = 60) -> float:
    """Microseconds a block visit, from the slope between a model of few and of many blocks."""
    x = torch.zeros(1, 3, 4)

    def price(count: int) -> float:
        model = _Tiny(count).eval()
        clock = [1000.0]

        def once() -> None:
            clock[0] -= 1e-3
            model(x, torch.tensor([clock[0]]))

        with torch.no_grad():
            bare = min(timeit.repeat(once, number=1, repeat=rounds))
            with ah.enable(model, _Blocks()):
                once()
                once()
                seamed = min(timeit.repeat(once, number=1, repeat=rounds))
        return seamed - bare

    return (price(blocks) - price(10)) / (blocks - 10) * 1e6


@dataclass(frozen=True, kw_only=True)
class _Blocks(Proceed):
    name: ClassVar[str] = "proceed_at_blocks"
    kinds = ("block",)


def inert(rounds: int = 7, number: int = 50_000) -> float:
    """Microseconds that an inert seam adds to a call."""
    module = nn.Identity()
    x = torch.zeros(1)
    site = Site("block", "x", module, Port(("input",), "input"))
    seam = Seam(None, [site])
    seam.active = False
    bare, seamed = [], []
    for _ in range(rounds):  # in turns, so that both see the same machine
        vars(module).pop("forward", None)
        bare.append(timeit.timeit(lambda: module(x), number=number))
        vars(module)["forward"] = seam
        seamed.append(timeit.timeit(lambda: module(x), number=number))
    return (min(seamed) - min(bare)) / number * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="write even when the machine is noisy")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    result = {
        "inert_seam_us": inert(),
        "visit_us": per_visit(),
        "in_place": in_place(options.rounds),
        "forward": forwards(options.rounds),
        "machine": {"processor": platform.machine(), "threads": options.threads},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    print(json.dumps(result, indent=1))
    if result["forward"]["plain_iqr"] > LIMIT_IQR and not options.force:
        raise SystemExit("the plain model's interquartile range is over 15 %: nothing written")
    (RESULTS / "overhead.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
