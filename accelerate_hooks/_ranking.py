"""The result of `evaluate`."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate_hooks import _metrics
from accelerate_hooks._survey import versions
from accelerate_hooks._table import milliseconds, percent, shortened
from accelerate_hooks.errors import AccelerateHooksError, SpecError

_HEADS = {
    "drift": "drift (rel. L2)",
    "psnr": "PSNR (dB)",
    "kl": "KL (nats)",
    "agreement": "same argmax",
}
_LABEL = 28


class NoisyMeasurementError(AccelerateHooksError):
    """Raised by `Table.check_quiet` when the plain model's times vary too much to compare."""


@dataclass(frozen=True)
class Row:
    """One contestant. Times in seconds an item; intervals are 95 % (bootstrap)."""

    label: str
    policy: str
    seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    visits_skipped: float | None
    flops_skipped: float | None
    value: float
    value_low: float
    value_high: float
    samples: int
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Contestants against the plain model; ``values`` holds the metric by label and sample."""

    metric: str
    rows: list[Row]
    values: dict[str, list[float]] = field(repr=False)
    plain_iqr: float
    peak: float
    items: int
    repeats: int
    seed: int
    torch: str

    def __getitem__(self, label: str) -> Row:
        for row in self.rows:
            if row.label == label:
                return row
        known = ", ".join(row.label for row in self.rows)
        raise SpecError(f"there is no row {label!r} in this table (there are: {known})")

    def difference(self, a: str, b: str) -> tuple[float, float, float]:
        """Mean of the metric of ``a`` minus that of ``b`` over the same samples, and its paired
        95 % interval."""
        first, second = (self.values[self[label].label] for label in (a, b))
        return _metrics.difference(first, second, self.seed)

    def check_quiet(self, limit: float = 0.15) -> None:
        """Raise NoisyMeasurementError if the plain model's interquartile range is over ``limit`` of
        its median: such times compare nothing."""
        if self.plain_iqr > limit:
            raise NoisyMeasurementError(
                f"the plain model's times have an interquartile range of {percent(self.plain_iqr)} "
                f"of their median (limit {percent(limit)}); free the machine and measure again"
            )

    # -- forms -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: infinities and NaN are words."""
        found = asdict(self) | {"schema": 1, "versions": versions()}
        return _words(found)

    def __str__(self) -> str:
        heads, cells = self._cells()
        widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
        lines = [_aligned(row, widths) for row in [heads, *cells]]
        lines.insert(1, "-" * len(lines[0]))
        notes = [f"{row.label}: {row.note}" for row in self.rows if row.note]
        for note in [*self._says(), *notes]:
            lines += textwrap.wrap(note, 99, subsequent_indent="  ")
        return "\n".join(lines)

    def to_markdown(self) -> str:
        heads, cells = self._cells()
        rule = ["---"] + ["---:"] * (len(heads) - 1)
        rows = [[cell.replace("|", "\\|") for cell in row] for row in [heads, rule, *cells]]
        return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", *self._says()])

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        heads = [
            "",
            "an item",
            "speed-up (95 %)",
            "visits",
            "FLOPs",
            f"{_HEADS[self.metric]} (95 %)",
        ]
        return heads, [
            [
                shortened(row.label, _LABEL),
                milliseconds(row.seconds * 1e3),
                f"{row.speedup:.2f}x ({row.speedup_low:.2f}-{row.speedup_high:.2f})",
                percent(row.visits_skipped),
                percent(row.flops_skipped),
                _between(row.value, row.value_low, row.value_high),
            ]
            for row in self.rows
        ]

    def _says(self) -> list[str]:
        samples = self.rows[0].samples
        lines = [
            f"{self.items} items x {self.repeats} interleaved repeats, {samples} samples; visits, "
            "FLOPs: shares skipped",
            f"the plain model's times: interquartile range {percent(self.plain_iqr)} of the median",
        ]
        if self.metric == "psnr":
            lines.append(f"PSNR for a data range of {self.peak:g}")
        return lines


def _between(value: float, low: float, high: float) -> str:
    around = "" if low == high == value else f" ({_number(low)} to {_number(high)})"
    return f"{_number(value)}{around}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "inf"
    return f"{value:.2e}" if value and abs(value) < 1e-2 else f"{value:.4g}"


def _aligned(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def _words(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _words(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_words(value) for value in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node
