"""Puts what was measured into README.md and docs/: the blocks between <!-- name --> markers.

    python benchmarks/pages.py [--check]

Each block is made of the JSON that a benchmark wrote into results/. `--check` writes nothing and
exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # a safe path (PYTHONSAFEPATH) lacks it

from plots import markdown_table as table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("lazy_step", "draft_attention", "kernels", "expert_skip")
    ),
)
NOT_MEASURED = "not measured yet: it needs a quiet machine"
_FREE = ("steps", "solver")
_NAMES = {
    "steps": "Euler, fewer steps",
    "solver": "DPM-Solver++ 2M, fewer steps",
    "first_block_cache": "FirstBlockCache",
    "taylorseer": "TaylorSeer",
    "mag_cache": "MagCache",
    "db_cache": "DBCache",
    "db_cache_taylorseer": "DBCache + TaylorSeer",
}


def read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rivals(data: Any, reference: str, target: float, ours: str) -> list[Any]:
    place = {"reference": reference, "target": target, "ours": ours, "axis": "saving"}
    return [
        row
        for row in data["comparisons"]
        if "db" in row and all(row[key] == value for key, value in place.items())
    ]


def lazy_step() -> str:
    """Ours, what is free, and the best cache, by cost and reference."""
    data = read("lazy_step")
    columns = ("FLOPs saved", "LazyStep", *(_NAMES[n] for n in _FREE), "best other cache")
    parts = []
    for reference, title, ours in (
        ("full", "Against the full run (50 Euler steps), PSNR in dB", ("lazy_step",)),
        (
            "converged",
            "Against the converged solution (500 steps), PSNR in dB",
            ("lazy_step", "lazy_step_solver"),
        ),
    ):
        head = list(columns)
        if len(ours) > 1:
            head.insert(2, "LazyStep on DPM-Solver++ 2M")
        lines = []
        for target in (1.5, 2.0, 3.0):
            rows = rivals(data, reference, target, "lazy_step")
            free = {row["contestant"]: f"{row['db']:.1f}" for row in rows}
            best = max((r for r in rows if r["contestant"] not in _FREE), key=lambda r: r["db"])
            cells = [f"{target:g}x"]
            cells += [f"{rivals(data, reference, target, o)[0]['ours_db']:.1f}" for o in ours]
            cells += [free.get(name, "-") for name in _FREE]
            cells.append(f"{best['db']:.1f} ({_NAMES[best['contestant']]})")
            lines.append(cells)
        parts.append(f"{title}:\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def defaults() -> str:
    """What `enable(pipe, "lazy_step")` gives: the three presets."""
    data = read("lazy_step")
    lines = []
    for preset in ("safe", "balanced", "fast"):
        for p in data["points"]:
            if p["contestant"] == "lazy_step" and p["setting"] == {"preset": preset}:
                speed = "not timed" if p["speed"] is None else f"{p['speed'][0]:.2f}x"
                values = (f"{p['saving']:.2f}x", speed, f"{p['psnr_full'][0]:.1f}")
                lines.append((preset, *values, f"{p['drift_full']:.4f}"))
    return table(("preset", "FLOPs", "time", "PSNR, dB", "drift"), lines)


def gates() -> str:
    data = read("lazy_gates")
    if data is None:
        return f"Gates against the training-free rules: {NOT_MEASURED}."
    own, off = data["gates"], data["difference"]
    mean = sum(own["psnr"]) / len(own["psnr"])
    return (
        f"The shipped gates skip {own['skipped']:.0%} of the visits at {mean:.1f} dB, "
        f"{off['mean']:+.1f} dB ({off['low']:+.1f} to {off['high']:+.1f}) beside the best "
        "training-free rule for sites at equal skips (`benchmarks/lazy_gates.py`). Whole steps "
        'with the corrector (scope `"model"`) are better still at that cost: see above.'
    )


def overhead() -> str:
    data = read("overhead")
    if data is None:
        return NOT_MEASURED + "."
    rows, plain = data["forward"]["rows"], data["forward"]["plain_ms"]
    parts = []
    for name, row in rows.items():
        part = f"{name} {(row['ratio'] - 1) * 100:+.1f} %"
        inside = data["in_place"].get(name)
        if inside is not None:
            part += (
                f" (by the clocks {inside['share'] * 100:.1f} %: {inside['forward_us']:.0f} µs in "
                f"{inside['visits']} visit{'s' if inside['visits'] > 1 else ''}, "
                f"{inside['visit_us']:.0f} µs each)"
            )
        parts.append(part)
    parts += [f"{name}: failed ({why})" for name, why in data["forward"]["failed"].items()]
    return (
        f"an inert seam {data['inert_seam_us']:.2f} µs, a visit of a block that does nothing "
        f"{data['visit_us']:.1f} µs (caches warm). A forward of a DiT 12x384, 256 tokens, two "
        f"threads, takes {plain:.0f} ms; between two visits our code leaves the processor's "
        "caches. Policies that skip nothing cost of it, by medians of "
        f"{data['forward']['rounds']} interleaved pairs and, since these differ by about a percent "
        "from run to run, by clocks on both sides of each seam (the model's own visit, which "
        f"recognises the run, included): {'; '.join(parts)}."
    )


def block_sparse() -> str:
    """Shares of the ideal, dense attention's time x density."""
    parts = []
    for device in ("cpu", "cuda"):
        data = read(f"block_sparse_attention_{device}")
        if data is None:
            parts.append(f"On {device.upper()}: {NOT_MEASURED.replace('quiet', device.upper())}.")
            continue
        heads, d = data["heads_and_head_size"]
        about = (
            f"{data['machine']['device']}, {data['machine']['threads']} threads, {heads} heads of "
            f"{d}, blocks of {data['block_size']}; shares of the ideal:\n\n"
        )
        head = ("tokens", "dtype", "sparsity", "dense, ms", "ours, ms", "ours")
        lines = []
        for row in data["rows"]:
            share = row["of_ideal"]
            flex = share.get("flex_attention, compiled")
            cells = (
                f"{row['tokens']:,}", row["dtype"], f"{row['sparsity']:g}",
                f"{row['ms'][row['dense']]:.1f}", f"{row['ms']['ours']:.1f}",
                f"{share['ours']:.2f}", "failed" if flex is None else f"{flex:.2f}",
            )  # fmt: skip
            lines.append(cells)
        parts.append(about + table((*head, "FlexAttention, compiled"), lines))
    return "\n\n".join(parts)


def draft_mass() -> str:
    """Of each layer of the trained video model, the attention mass that is kept."""
    data = read("draft_attention_cpu")
    if data is None:
        return f"Mass kept on the trained model: {NOT_MEASURED}."
    mass = data["mass"]
    about = (
        f"Regions of {' x '.join(map(str, mass['pool']))} tokens, select {mass['select']}, density "
        f"{mass['density']:g}, seeds {mass['seeds'][0]} to {mass['seeds'][1]}:\n\n"
    )
    kinds = ("random", "draft", "oracle")
    lines = [
        (name, *(f"{row[kind]:.3f}" for kind in kinds), f"{row['recovered']:.2f}")
        for name, row in mass["layers"].items()
    ]
    return about + table(("layer", *kinds, "(draft - random) / (oracle - random)"), lines)


def draft_generations() -> str:
    """Whole generations of the trained video model."""
    data = read("draft_attention_cpu")
    if data is None:
        return f"Generations of the trained model: {NOT_MEASURED}."
    lines = []
    for row in data["generations"]:
        flops = row["flops_skipped"]
        cells = (
            row["contestant"],
            "{:.2f}x ({:.2f} to {:.2f})".format(row["speedup"], *row["speedup_interval"]),
            "-" if flops is None else f"{flops:.0%}",
            f"{row['drift']:.3f}", f"{row['psnr_db']:.1f}",
        )  # fmt: skip
        lines.append(cells)
    return table(("", "time", "FLOPs left out", "drift", "PSNR, dB"), lines)


def draft_wide() -> str:
    """A block as wide as Wan-1.3B's."""
    data = read("draft_attention_cpu")
    if data is None:
        return f"The wide block: {NOT_MEASURED}."
    head = ("tokens", "sparsity", "model", "attention", "draft, selection, reorder of dense")
    ranked = ("draft", "random", "oracle")
    lines = []
    for size in data["wide"]:
        for row in size["rows"]:
            cells = (
                f"{size['tokens']:,}", f"{row['sparsity']:g}", f"{row['speedup']:.2f}x",
                f"{row['attention_speedup']:.2f}x",
                f"{row['draft_select_reorder_of_dense'] * 100:.1f} %",
                *(f"{row['quality'][name]['drift']:.4f}" for name in ranked),
            )  # fmt: skip
            lines.append(cells)
    return table((*head, *(f"drift, {name}" for name in ranked)), lines)


def expert_layer() -> str:
    """A full-size layer: ours beside transformers' own."""
    parts = []
    for device in ("cpu", "cuda"):
        data = read(f"expert_skip_{device}")
        if data is None:
            parts.append(f"On {device.upper()}: {NOT_MEASURED.replace('quiet', device.upper())}.")
            continue
        k = data["layer"]["top_k"]
        kept = sorted(map(int, data["rows"][0]["experts_touched"]), reverse=True)
        others = ("grouped_mm", "batched_mm", "eager")
        lines = []
        for row in data["rows"]:
            ms, share = row["ms"], row["of_proportional"]
            lines.append((
                row["dtype"], row["tokens"], *(f"{ms[n]:.1f}" if n in ms else "-" for n in others),
                *(f"{ms[f'ours, {n} of {k}']:.1f} ({share[str(n)]:.2f})" for n in kept),
            ))  # fmt: skip
        head = ("dtype", "tokens", *(f"{n}, ms" for n in others), *(f"ours, {n}" for n in kept))
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def expert_rules() -> str:
    """Fewer experts a token on the trained mixture."""
    data = read("expert_quality")
    if data is None:
        return f"Rules on the trained mixture: {NOT_MEASURED}."
    return _experts(data["rows"], ("rule", "setting"))


def expert_pruning() -> str:
    """Fewer experts in the trained mixture."""
    data = read("expert_quality")
    if data is None:
        return f"Pruning of the trained mixture: {NOT_MEASURED}."
    return _experts(data["pruned"], ("by", "pruned"))


def _experts(rows: list[Any], names: tuple[str, str]) -> str:
    lines = [
        (
            row["group"], row["setting"], f"{row['experts']:.2f}", f"{row['perplexity']:.3f}",
            "{:+.1%} ({:+.1%} to {:+.1%})".format(*row["more_perplexity"]),
            f"{row['esap'][0]:.3f}",
        )
        for row in rows
    ]  # fmt: skip
    return table((*names, "experts", "perplexity", "beside the full model", "esap"), lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "lazy_step": lazy_step, "defaults": defaults, "gates": gates, "overhead": overhead,
    "block_sparse": block_sparse, "draft_mass": draft_mass,
    "draft_generations": draft_generations, "draft_wide": draft_wide,
    "expert_layer": expert_layer, "expert_rules": expert_rules, "expert_pruning": expert_pruning,
}  # fmt: skip


def filled(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        name, apart = match["name"], "\n" if "\n" in match["old"] else ""
        return f"<!-- {name} -->{apart}{BLOCKS[name]()}{apart}<!-- /{name} -->"

    names = "|".join(BLOCKS)
    return re.sub(
        rf"<!-- (?P<name>{names}) -->(?P<old>.*?)<!-- /(?P=name) -->", fill, text, flags=re.S
    )


def stale() -> Iterator[tuple[Path, str]]:
    """Pages that do not say what the results say, with what they should."""
    for path in PAGES:
        text = path.read_text()
        if (new := filled(text)) != text:
            yield path, new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    found = list(stale())
    for path, text in found:
        print(path.relative_to(ROOT), file=sys.stderr)
        if not options.check:
            path.write_text(text)
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
