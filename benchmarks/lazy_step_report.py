"""The tables, the verdict and the figure of `lazy_step.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plots
from peers import Contestant, spell

TARGETS = (1.5, 2.0, 3.0)
"""Savings at which the curves are compared."""

REACH = 3.4
"""Scored points go on to here, so that a curve in measured time reaches the last target too."""

GOAL = {"full": {1.5: 0.0, 2.0: 3.0, 3.0: 0.0}, "converged": {1.5: 0.0, 2.0: 0.0, 3.0: 0.0}}
"""Decibels by which ours is to be above."""

Row = dict[str, Any]
OURS = ("lazy_step", "lazy_step_solver")
REFERENCES = {"full": "the full run", "converged": "the converged run"}
AXES = {"saving": "computed FLOPs", "speed": "measured time"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One scored setting: per-image values, means and what it cost.

    saving: FLOPs of the full run by FLOPs of this one. speed: the same for seconds, as the median
    of the pairs with their smallest and largest (of 6 pairs: a 97 % interval of the median).
    used: the references whose curve it belongs to.
    """

    contestant: Contestant
    setting: Row
    saving: float
    speed: tuple[float, float, float] | None
    seconds: float | None
    psnr: dict[str, plots.Array]
    drift: dict[str, float]
    accuracy: float
    used: tuple[str, ...]

    def x(self, axis: str) -> float | None:
        return self.saving if axis == "saving" else self.speed[0] if self.speed else None


def point(
    contestant: Contestant, row: Row, full: Row, times: Row | None, used: Sequence[str]
) -> Point:
    speed = None
    if times is not None:
        ratios = np.asarray(times["plain"]) / np.asarray(times["own"])
        speed = (float(np.median(ratios)), float(ratios.min()), float(ratios.max()))
    return Point(
        contestant=contestant,
        setting=row["setting"],
        saving=full["flops"] / row["flops"],
        speed=speed,
        seconds=float(np.median(times["own"])) if times else None,
        psnr={name: np.asarray(row[f"psnr_{name}"]) for name in REFERENCES},
        drift={name: float(np.mean(row[f"drift_{name}"])) for name in REFERENCES},
        accuracy=float(np.mean(row["correct"])),
        used=tuple(used),
    )


# -- the comparison ----------------------------------------------------------------------------


def curve(points: Sequence[Point], name: str, reference: str, axis: str) -> list[Point]:
    """A contestant's points for one reference, where the axis was measured."""
    chosen = [p for p in points if p.contestant.name == name and reference in p.used]
    return sorted((p for p in chosen if p.x(axis)), key=lambda p: p.x(axis) or 0.0)


def at(points: Sequence[Point], reference: str, axis: str, target: float) -> plots.Array | None:
    """Per-image decibels of a curve at a target; `None` where it does not get there."""
    if not points:
        return None
    savings = np.asarray([p.x(axis) for p in points], dtype=float)
    return plots.interpolate(savings, np.stack([p.psnr[reference] for p in points]), target)


def compare(points: Sequence[Point], ours: str, axis: str) -> list[Row]:
    """Ours minus each other contestant, at each target and against each reference."""
    names = list(dict.fromkeys(p.contestant.name for p in points))
    rows = []
    for reference in REFERENCES:
        for target in TARGETS:
            own = at(curve(points, ours, reference, axis), reference, axis, target)
            for name in (name for name in names if name not in OURS):
                there = at(curve(points, name, reference, axis), reference, axis, target)
                row = {"reference": reference, "target": target, "contestant": name}
                row |= {"ours": ours, "axis": axis}
                if own is not None and there is not None:
                    row["ours_db"] = round(float(own.mean()), 2)
                    mean, low, high = plots.interval(own - there)
                    row |= {"db": round(float(there.mean()), 2), "difference": round(mean, 2)}
                    row |= {"low": round(low, 2), "high": round(high, 2)}
                rows.append(row)
    return rows


def verdicts(comparisons: Sequence[Row]) -> list[Row]:
    """Each reference and target: ours against the best of the others; is it enough?"""
    result: list[Row] = []
    for reference in REFERENCES:
        for target in TARGETS:
            place = (reference, target)
            rivals = [
                r for r in comparisons if (r["reference"], r["target"]) == place and "db" in r
            ]
            for best in sorted(rivals, key=lambda row: -row["db"])[:1]:
                met = best["low"] > 0 and best["difference"] >= GOAL[reference][target]
                result.append(best | {"met": met})
    return result


# -- writing -----------------------------------------------------------------------------------


def write(results: Path, about: Row, full: Row, points: Sequence[Point]) -> None:
    """`results` with `.json`, `.md` and `.png`."""
    comparisons = [row for axis in AXES for ours in OURS for row in compare(points, ours, axis)]
    level = {name: float(np.mean(full[f"psnr_{name}"])) for name in REFERENCES}
    results.parent.mkdir(parents=True, exist_ok=True)
    whole = {"flops": full["flops"], "accuracy": float(np.mean(full["correct"]))}
    data = about | {
        "full_run": whole | {f"psnr_{name}": round(db, 2) for name, db in level.items()},
        "points": [_plain(p) for p in points],
        "comparisons": comparisons,
    }
    results.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    results.with_suffix(".md").write_text(_page(data, points))
    print(f"wrote {results}.md, .json and .png")
    _figure(results.with_suffix(".png"), points, level, about["protocol"])


def _plain(p: Point) -> Row:
    row = {"contestant": p.contestant.name, "setting": p.setting, "saving": round(p.saving, 4)}
    row |= {"speed": p.speed, "seconds": p.seconds, "accuracy": p.accuracy, "used_for": p.used}
    for name in REFERENCES:
        numbers = [round(value, 3) for value in plots.interval(p.psnr[name])]
        row |= {f"psnr_{name}": numbers, f"drift_{name}": round(p.drift[name], 5)}
    return row


def _page(data: Row, points: Sequence[Point]) -> str:
    protocol, full, comparisons = data["protocol"], data["full_run"], data["comparisons"]
    select, score = protocol["select"], protocol["score"]
    parts = [
        "# LazyStep beside what else there is",
        f"Written by `benchmarks/lazy_step.py`. {protocol['steps']} Euler steps, guidance 2 as two "
        f"sequential calls, batch {protocol['batch']}, fp32. Settings chosen on seeds {select[0]} "
        f"to {select[1] - 1}, scored on {score[0]} to {score[1] - 1}. PSNR in dB with peak 1.0 on "
        "images in [0, 1], per image, then the mean, against the full run and against "
        f"{protocol['converged_steps']} Euler steps from the same noise; differences with paired "
        "bootstrap 95 % intervals. FLOPs are counted by `torch.utils.flop_counter`. "
        f"The full run itself: {full['psnr_converged']:.1f} dB against the converged one, "
        f"{full['accuracy']:.1%} read as the digit asked for. "
        f"The converged run and {protocol['converged_steps']} steps of DPM-Solver++ 2M are "
        f"{data['converged_check']:.1f} dB apart: differences near that are not resolved.",
        f"Machine: {data['machine']}. Versions: {data['versions']}. Weights: "
        f"`{data['model_sha256']}`.",
        "![curves](lazy_step.png)",
    ]
    for axis, what in AXES.items():
        for ours in OURS:
            rows = [r for r in comparisons if r["axis"] == axis and r["ours"] == ours]
            if any("db" in r for r in rows):
                label = _labels(points)[ours]
                parts += [f"## {label} minus the others, at equal {what}", _verdict(rows, points)]
                parts += [_differences(rows, points)]
    parts += ["## All scored points", _points(points), "## That each peer skipped work"]
    parts += [_proofs(data["proofs"])]
    return "\n\n".join(parts) + "\n"


def _labels(points: Sequence[Point]) -> dict[str, str]:
    return {p.contestant.name: p.contestant.label for p in points}


def _verdict(rows: Sequence[Row], points: Sequence[Point]) -> str:
    labels, found, lines = _labels(points), verdicts(rows), []
    for reference, target in dict.fromkeys((r["reference"], r["target"]) for r in rows):
        place, goal = f"{REFERENCES[reference]}, {target:g}x", GOAL[reference][target]
        wanted = f"above by {goal:g} dB" if goal else "above"
        some = [v for v in found if (v["reference"], v["target"]) == (reference, target)]
        for v in some:
            best = f"{v['db']:.1f}, {labels[v['contestant']]}"
            told = "met" if v["met"] else "**not met**"
            lines.append((place, f"{v['ours_db']:.1f}", best, _difference(v), wanted, told))
        if not some:
            lines.append((place, "-", "-", "-", wanted, "**not reached, or not timed**"))
    headers = ("against, at", "ours, dB", "best other, dB", "difference, dB", "goal", "")
    return plots.markdown_table(headers, lines)


def _difference(row: Row) -> str:
    return f"{row['difference']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})"


def _differences(rows: Sequence[Row], points: Sequence[Point]) -> str:
    places = list(dict.fromkeys((r["reference"], r["target"]) for r in rows))
    cells = {(r["contestant"], r["reference"], r["target"]): r for r in rows}
    lines = []
    for name in dict.fromkeys(r["contestant"] for r in rows):
        line = [_labels(points)[name]]
        for place in places:
            r = cells.get((name, *place))
            reached = r is not None and "db" in r
            line.append(
                f"{r['difference']:+.1f} ({r['low']:+.1f} to {r['high']:+.1f})" if reached else "-"
            )
        lines.append(line)
    headers = ["contestant", *(f"{target:g}x, {reference}" for reference, target in places)]
    return plots.markdown_table(headers, lines) + "\n\n-: one of the two does not save as much."


def _points(points: Sequence[Point]) -> str:
    lines = []
    for p in sorted(points, key=lambda p: (p.contestant.label, p.saving)):
        speed = f"{p.speed[0]:.2f}x ({p.speed[1]:.2f} to {p.speed[2]:.2f})" if p.speed else "-"
        db = [f"{p.psnr[name].mean():.1f}" for name in REFERENCES]
        drift = f"{p.drift['full']:.4f}"
        line = (p.contestant.label, spell(p.setting), f"{p.saving:.2f}x", speed)
        lines.append((*line, *db, drift, f"{p.accuracy:.1%}"))
    headers = ("contestant", "setting", "FLOPs", "time", "dB, full", "dB, converged")
    return plots.markdown_table((*headers, "drift, full", "accuracy"), lines)


def _proofs(proofs: Sequence[Row]) -> str:
    lines = []
    for proof in proofs:
        ran = f"{proof['linear_calls']} of {proof['linear_calls_plain']}"
        checks = (proof["second_run_equal"], proof["plain_after_disable"])
        left = ", ".join(f"{count} {name}" for name, count in proof["left_behind"].items())
        told = ("yes" if check else "**no**" for check in checks)
        lines.append((proof["contestant"], spell(proof["setting"]), ran, *told, left or "none"))
    headers = ("contestant", "setting", "linear layers run", "second run bit-equal")
    more = ("plain output bit-equal after disable", "attributes left behind")
    return plots.markdown_table(headers + more, lines)


def _figure(path: Path, points: Sequence[Point], level: dict[str, float], protocol: Row) -> None:
    names = list(dict.fromkeys(p.contestant.name for p in points))
    labels = _labels(points)
    axes = {axis: what for axis, what in AXES.items() if any(p.x(axis) for p in points)}
    panels = []
    for reference, title in REFERENCES.items():
        row = []
        for axis, what in axes.items():
            lines = {name: curve(points, name, reference, axis) for name in names}
            series = [
                plots.Series(
                    label=labels[name],
                    x=[p.x(axis) or 0.0 for p in line],
                    y=[float(p.psnr[reference].mean()) for p in line],
                    place=names.index(name),
                    bold=name in OURS,
                    dashed=line[0].contestant.scheduler == "dpm",
                )
                for name, line in lines.items()
                if line
            ]
            row.append(
                plots.Panel(
                    title=f"against {title}",
                    xlabel=f"{what}, times less than the full run",
                    ylabel="PSNR, dB",
                    series=series,
                    targets=TARGETS,
                    level=("full run", level[reference]) if reference == "converged" else None,
                    xlim=(1.2, 4.2),
                )
            )
        panels.append(row)
    seeds = protocol["score"][1] - protocol["score"][0]
    title = f"Quality kept, work saved: digits model, {protocol['steps']} steps, {seeds} new seeds"
    plots.draw(path, panels if len(axes) > 1 else [[p for row in panels for p in row]], title)
