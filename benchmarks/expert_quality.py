"""ExpertSkip on a really trained mixture: perplexity and acceptance against experts kept.

    expert_quality.py           # measures and draws; writes benchmarks/results/
    expert_quality.py --draw    # the figure and the table from what is there

The model is that of `zoo/moe_lm.py` (16 experts, 4 a byte). Rules are fitted on 64 windows of its
training bytes and scored on the held-out ones, beside the model's own router with a smaller top-k
(what a user can have for nothing) and slots dropped at random to the same average. Perplexity a
byte over the second half of each window; `esap` of the same bytes against the full model, 95 %
intervals over windows. Experts are counted as they are asked, a visit at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from accelerate_hooks import Call, Effect, ExpertSkip, Policy, Site, enable
from accelerate_hooks.kernels import esap

sys.path.append(str(Path(__file__).parent))  # a safe path (PYTHONSAFEPATH) lacks it
sys.path.append(str(Path(__file__).parent / "zoo"))

import moe_lm
import plots

RESULTS = Path(__file__).parent / "results"
TARGETS = (3.0, 2.5, 2.0, 1.5)
"""Mean experts a token that rules are fitted to."""

SHARES = (0.25, 0.5)
"""Of the experts, pruned."""

CRITERIA = ("aimer", "frequency", "router_weight", "activation_norm", "reap")
FIT_WINDOWS, BATCH = 64, 32
SEARCH_WINDOWS, GENERATIONS = 16, 5


@dataclass(frozen=True, kw_only=True)
class RandomSkip(Policy):
    """Keeps slots drawn at random, ``average`` of them a token, brought back to the same sum."""

    name: ClassVar[str] = "random_skip"
    average: float = 2.0

    @property
    def kinds(self) -> Any:
        return ("experts",)

    @classmethod
    def exact(cls) -> Self:
        return cls(average=64.0)

    @classmethod
    def example(cls) -> Self:
        return cls(average=1.0)

    def acts(self, site: Site) -> frozenset[Effect]:
        return frozenset({Effect.RESHAPE})

    def around(self, call: Call) -> Any:
        if call.routing is None:
            return call.proceed()
        indices, weights = call.routing
        low = math.floor(self.average)
        extra = torch.rand(len(weights), 1, generator=call.generator) < self.average - low
        place = torch.rand(weights.shape, generator=call.generator).argsort(-1).argsort(-1)
        kept = place < low + extra.int()
        some = weights * kept
        some = some * (weights.sum(-1, keepdim=True) / some.sum(-1, keepdim=True))
        call.note("random", experts=kept.sum(-1).float().mean().item())
        return call.proceed(routing=(indices, some))


@dataclass
class Scores:
    """Of one contestant, a value a window: mean loss in nats, mean acceptance; and experts."""

    loss: Tensor
    esap: Tensor
    experts: float


class Lab:
    def __init__(self) -> None:
        self.data, held = moe_lm.text()
        size = moe_lm.LENGTH
        self.windows = moe_lm.windows(held)
        generator = torch.Generator().manual_seed(1)
        places = torch.randint(len(self.data) - size, (FIT_WINDOWS,), generator=generator)
        rows = torch.stack([self.data[p : p + size] for p in places.tolist()]).long()
        self.fit_data = [{"input_ids": some, "use_cache": False} for some in rows.split(BATCH)]
        self.search_data = [{"input_ids": rows[:SEARCH_WINDOWS], "use_cache": False}]
        self.model = moe_lm.load_moe_lm()
        self.top_k = self.model.config.num_experts_per_tok
        self.full = self._logits(None)[0]

    def _logits(self, policy: Policy | None) -> tuple[Tensor, float]:
        half, parts, counts = moe_lm.LENGTH // 2, [], []
        for rows in self.windows.split(BATCH):
            with torch.no_grad():
                if policy is None:
                    out = self.model(rows, use_cache=False).logits
                else:
                    with enable(self.model, policy) as session:
                        out = self.model(rows, use_cache=False).logits
                    visits = [
                        v["numbers"]
                        for v in session.report().steps
                        if v["site"].endswith(".experts")
                    ]
                    mean = [v.get("experts", float(self.top_k)) for v in visits]
                    counts.append(float(np.mean(mean)) * len(rows))
            parts.append(out[:, half - 1 : -1])
        return torch.cat(parts), sum(counts) / len(self.windows) if counts else float(self.top_k)

    def score(self, policy: Policy | None) -> Scores:
        logits, experts = self._logits(policy)
        truth = self.windows[:, moe_lm.LENGTH // 2 :]
        loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
        return Scores(loss.view(truth.shape).mean(1), esap(logits, self.full).mean(1), experts)

    def row(self, group: str, label: str, policy: Policy | None) -> dict[str, Any]:
        scores, plain = self.score(policy), self.score(None) if policy is None else self.plain
        if policy is None:
            self.plain = scores
        more = (scores.loss - plain.loss).numpy()
        mean, low, high = plots.interval(more)
        esap_mean, esap_low, esap_high = plots.interval(scores.esap.numpy())
        return {
            "group": group,
            "setting": label,
            "policy": None if policy is None else str(policy),
            "experts": round(scores.experts, 4),
            "perplexity": round(math.exp(scores.loss.mean().item()), 5),
            "more_perplexity": [round(math.expm1(v), 5) for v in (mean, low, high)],
            "esap": [round(v, 5) for v in (esap_mean, esap_low, esap_high)],
        }


def contestants(lab: Lab) -> Iterator[tuple[str, str, Policy | None]]:
    model, data = lab.model, lab.fit_data
    yield "full", "4 of 16 experts", None
    for k in (3, 2, 1):
        yield "smaller top_k", f"top_k={k}", ExpertSkip(top_k=k)
    for average in (*TARGETS, 1.0):
        yield "random slots", f"{average:g} on average", RandomSkip(average=average)
    for ratio in (0.2, 0.4, 0.6, 0.8):
        yield "ratio", f"ratio={ratio}", ExpertSkip(ratio=ratio)
    for mass in (0.9, 0.8, 0.65, 0.5):
        yield "mass", f"mass={mass}", ExpertSkip(mass=mass)
    for floor in (0.1, 0.15, 0.2, 0.3):
        yield "floor", f"floor={floor}", ExpertSkip(floor=floor)
    for bound in (0.1, 0.2, 0.4):
        policy = ExpertSkip(ratio=1.0, max_dropped_mass=bound)
        yield "max_dropped_mass", f"ratio=1, max_dropped_mass={bound:g}", policy
    for rule in ({"ratio": 0.5}, {"mass": 0.5}, {"floor": 0.1}, {"top_k": 1}):
        (name,) = rule
        for target in TARGETS:
            fitted = ExpertSkip(**rule).fit(model, data, target=target, progress=False)
            yield f"{name}, fitted", f"{target:g} on average", fitted
    for target in TARGETS:
        found = ExpertSkip(top_k=1).fit(model, None, target=target)
        yield "top_k, no data (LExI)", f"{target:g} on average", found


def prunings(lab: Lab) -> Iterator[tuple[str, str, Policy]]:
    model, data = lab.model, lab.fit_data
    for share in SHARES:
        measured = ExpertSkip(prune=share, criterion="reap").fit(model, data, progress=False)
        for criterion in CRITERIA:
            policy = ExpertSkip(prune=share, criterion=criterion, artifact=measured.artifact)
            yield f"prune, {criterion}", f"{share:.0%}", policy
        yield (
            "prune, reap, merged",
            f"{share:.0%}",
            ExpertSkip(prune=share, criterion="reap", merge=True, artifact=measured.artifact),
        )
        for seed in range(3):
            yield "prune, random", f"{share:.0%}, seed {seed}", at_random(lab, share, seed)
        searched = ExpertSkip(prune=share, criterion="reap").fit(
            model, lab.search_data, target=share, generations=GENERATIONS
        )
        yield "prune, reap, budgets searched", f"{share:.0%}", searched


def at_random(lab: Lab, share: float, seed: int) -> ExpertSkip:
    """Experts drawn at random, as if a criterion had said so."""
    from accelerate_hooks.artifact import Artifact

    generator = torch.Generator().manual_seed(seed)
    layers, experts = lab.model.config.num_hidden_layers, lab.model.config.num_experts
    scores = {f"frequency.{i}": torch.rand(experts, generator=generator) for i in range(layers)}
    artifact = Artifact.create(scores, policy="expert_skip", model=lab.model)
    return ExpertSkip(prune=share, criterion="frequency", artifact=artifact)


def draw(result: dict[str, Any]) -> None:
    names = dict.fromkeys(r["group"] for r in result["rows"] if r["group"] != "full")
    start = next(r for r in result["rows"] if r["group"] == "full")
    top = start["experts"]

    def series(value: Any, leave_out: str = "") -> list[plots.Series]:
        return [
            plots.Series(
                label=name,
                x=[1.0, *(top / r["experts"] for r in result["rows"] if r["group"] == name)],
                y=[value(start), *(value(r) for r in result["rows"] if r["group"] == name)],
                place=place,
                bold="fitted" in name,
                dashed=name in ("random slots", "smaller top_k"),
            )
            for place, name in enumerate(names)
            if name != leave_out
        ]

    panels = [
        plots.Panel(
            title="What it costs",
            xlabel="fewer experts a token",
            ylabel="perplexity, % above the full model's",
            series=series(lambda r: 100 * r["more_perplexity"][0], leave_out="random slots"),
            level=("3 %", 3.0),
            ylim=(-0.5, 16.0),
        ),
        plots.Panel(
            title="How often the full model would accept its bytes",
            xlabel="fewer experts a token",
            ylabel="esap",
            series=series(lambda r: r["esap"][0]),
        ),
    ]
    path = RESULTS / "expert_quality.png"
    plots.draw(path, [panels], "ExpertSkip on a trained mixture (16 experts, 4 a byte)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only the figure, from what is there")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = RESULTS / "expert_quality.json"
    if not options.draw:
        lab = Lab()
        rows, pruned = [], []
        for group, label, policy in tqdm(contestants(lab)):
            rows.append(lab.row(group, label, policy))
            tqdm.write(json.dumps(rows[-1]))
        for group, label, policy in tqdm(prunings(lab)):
            pruned.append(lab.row(group, label, policy))
            tqdm.write(json.dumps(pruned[-1]))
        result = {
            "rows": rows,
            "pruned": pruned,
            "fitted_on_bytes": FIT_WINDOWS * moe_lm.LENGTH,
            "scored_bytes": len(lab.windows) * moe_lm.LENGTH // 2,
            "machine": plots.machine(),
            "versions": plots.versions("torch", "transformers", "accelerate-hooks"),
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
    draw(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
