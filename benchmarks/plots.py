"""What the scripts of this folder share: points on a cost curve, intervals, tables, figures."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 5000
"""Bootstrap resamples behind a 95 % interval."""


# -- points on a curve of cost against quality -------------------------------------------------


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats in both saving and value, by saving."""
    best, front = -np.inf, []
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], -values[i])):
        if values[i] > best:
            best = values[i]
            front.append(i)
    return front[::-1]


def brackets(costs: Sequence[float], values: Sequence[float], targets: Iterable[float]) -> set[int]:
    """Indices of the Pareto points next to each target saving, on either side of it."""
    front = pareto(costs, values)
    chosen: set[int] = set()
    for target in targets:
        chosen.update([i for i in front if costs[i] <= target][-1:])
        chosen.update([i for i in front if costs[i] >= target][:1])
    return chosen


def interpolate(savings: Array, values: Array, target: float) -> Array | None:
    """Values `[points, ...]` at a target saving, linear in the logarithm of the saving.

    Left of the first point its value holds (who saves more may be asked for less); right of the
    last one there is none.
    """
    order = np.argsort(savings)
    x, y = np.log(savings[order]), values[order]
    at = np.log(target)
    if at > x[-1] + 1e-9:
        return None
    right = int(np.searchsorted(x, at - 1e-9))
    if right == 0 or x[right] - at < 1e-9:
        return y[right]
    weight = (at - x[right - 1]) / (x[right] - x[right - 1])
    return (1 - weight) * y[right - 1] + weight * y[right]


def interval(values: Array, seed: int = 0) -> tuple[float, float, float]:
    """Mean and bootstrapped 95 % interval of per-image values (or of paired differences)."""
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def relative_iqr(values: Sequence[float]) -> float:
    """Interquartile range by median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)


# -- what stands beside every number -----------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, threads and what torch makes of them."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def code(path: Path) -> bytes:
    """A module's source without comments and docstrings: rewording them changes no result."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            strings = (s for s in node.body if isinstance(s, ast.Expr))
            words = [s for s in strings if isinstance(s.value, ast.Constant)]
            node.body = [s for s in node.body if s not in words] or [ast.Pass()]
    return ast.unparse(tree).encode()


def digest(*parts: bytes) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A GitHub table; numbers are spelled by the caller."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# -- figures -----------------------------------------------------------------------------------

_COLOURS = (
    *("#d7263d", "#f28e2b", "#1b1b1b", "#4e79a7", "#76b7b2", "#59a14f", "#9c755f", "#b07aa1"),
    *("#8c8c8c", "#2e5e4e"),
)
_MARKERS = "ooDDsv^<>P"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One contestant in one panel: savings, values, and how heavily it is drawn."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    place: int
    bold: bool = False
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes; `level` is a horizontal line with a name."""

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    targets: Sequence[float] = ()
    level: tuple[str, float] | None = None
    xlim: tuple[float, float] | None = None
    ylim: tuple[float, float] | None = None


def draw(path: Path, panels: Sequence[Sequence[Panel]], title: str) -> None:
    """Panels as rows and columns over one legend, as a PNG wide enough for a README."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows, columns = len(panels), len(panels[0])
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.6 * columns, 4.2 * rows + 1.3), squeeze=False
    )
    for axis, panel in zip(axes.flat, (p for row in panels for p in row), strict=True):
        for series in panel.series:
            order = np.argsort(series.x)
            axis.plot(
                np.asarray(series.x)[order],
                np.asarray(series.y)[order],
                label=series.label,
                color=_COLOURS[series.place % len(_COLOURS)],
                marker=_MARKERS[series.place % len(_MARKERS)],
                markersize=6 if series.bold else 4.5,
                linewidth=2.6 if series.bold else 1.3,
                linestyle="--" if series.dashed else "-",
                zorder=3 if series.bold else 2,
            )
        for target in panel.targets:
            axis.axvline(target, color="0.85", linewidth=1, zorder=1)
        if panel.level is not None:
            name, height = panel.level
            axis.axhline(height, color="0.4", linewidth=1, linestyle=":", label=name)
        axis.set_xscale("log")
        if panel.ylim is not None:
            axis.set_ylim(*panel.ylim)
        axis.xaxis.set_major_locator(FixedLocator([1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        if panel.xlim is not None:
            axis.set_xlim(*panel.xlim)
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axis.grid(axis="y", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    named = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(title, fontsize=13)
    figure.legend(
        named.values(), named.keys(), loc="lower center", ncols=3, frameon=False, fontsize=10
    )
    legend_height = 0.28 * -(-len(named) // 3) + 0.15
    figure.tight_layout(rect=(0, legend_height / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
