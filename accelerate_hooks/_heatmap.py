"""The map of steps and sites of a run: as a grid of cells, as a PNG and as an inline SVG."""

from __future__ import annotations

import html
import io
import math
from dataclasses import dataclass
from typing import Any

from accelerate_hooks._table import percent, shortened

Data = dict[str, Any]
Colour = tuple[int, int, int]
_ROWS, _COLUMNS, _LABEL = 40, 120, 38
COMPUTED: Colour = (47, 93, 138)
PARTLY: Colour = (134, 187, 216)
NOTHING: Colour = (238, 238, 238)
YOUNG: Colour = (255, 224, 150)
OLD: Colour = (196, 57, 58)


@dataclass
class Cell:
    """The visits behind one cell of the map."""

    visits: int = 0
    left_out: float = 0.0
    age: int = 0

    def add(self, visit: Data) -> None:
        self.visits += 1
        if visit["action"] == "skipped":
            self.left_out += 1.0
            self.age = max(self.age, visit["age"] or 1)
        elif visit["action"] == "partly":
            self.left_out += visit["numbers"].get("share_left_out", 0.5)

    @property
    def share(self) -> float:
        return self.left_out / self.visits if self.visits else 0.0

    def colour(self, oldest: int) -> Colour:
        if not self.visits:
            return NOTHING
        if self.left_out == 0.0:
            return COMPUTED
        return PARTLY if self.share < 1.0 else ramp(self.age, oldest)


@dataclass
class Grid:
    """Rows of sites (and CFG branches), columns of steps (``stride`` steps each)."""

    run: int | None
    labels: list[str]
    cells: list[list[Cell]]
    first: int
    stride: int
    oldest: int

    def shares(self) -> list[float]:
        """The share of visits left out of each row."""
        return [
            sum(c.left_out for c in row) / max(sum(c.visits for c in row), 1) for row in self.cells
        ]

    def ticks(self) -> list[tuple[int, str]]:
        """(column, step) at round distances."""
        count = len(self.cells[0])
        every = max(1, math.ceil(count / 12))
        every = next(n for n in (1, 2, 5, 10, 20, 50) if n >= every)
        return [(i, str(self.first + i * self.stride)) for i in range(0, count, every)]

    def legend(self) -> list[tuple[str, Colour]]:
        """What the colours in it say."""
        seen = [cell for row in self.cells for cell in row if cell.visits]
        shown = [("computed", COMPUTED)]
        if any(0.0 < cell.share < 1.0 for cell in seen):
            shown.append(("partly skipped", PARTLY))
        ages = sorted({cell.age for cell in seen if cell.share == 1.0})
        if len(ages) > 4:
            ages = [ages[0], ages[len(ages) // 3], ages[2 * len(ages) // 3], ages[-1]]
        for age in ages:
            shown.append((f"skipped, age {age}", ramp(age, self.oldest)))
        if any(not cell.visits for row in self.cells for cell in row):
            shown.append(("not visited", NOTHING))
        return shown


def ramp(age: int, oldest: int) -> Colour:
    """Skipped: the older what was reused, the redder."""
    t = 0.0 if oldest <= 1 else (age - 1) / (oldest - 1)
    red, green, blue = (round(a + (b - a) * t) for a, b in zip(YOUNG, OLD, strict=True))
    return red, green, blue


def grid(data: Data) -> Grid:
    """The map of the run that the report is of, else of the latest one with most steps."""
    visits = data["steps"]
    if not visits:
        return Grid(data["run"], ["no visit yet"], [[Cell()]], 0, 1, 1)
    run = data["run"]
    if run is None:
        lengths: dict[int, set[int]] = {}
        for visit in visits:
            lengths.setdefault(visit["run"], set()).add(visit["step"])
        run = max(lengths, key=lambda number: (len(lengths[number]), number))
    visits = [visit for visit in visits if visit["run"] == run]
    places = _places(visits, [line["site"] for line in data["sites"]])
    first = min(visit["step"] for visit in visits)
    span = max(visit["step"] for visit in visits) - first + 1
    stride = math.ceil(span / _COLUMNS)
    chunk = math.ceil(len(places) / _ROWS)
    rows = [places[i : i + chunk] for i in range(0, len(places), chunk)]
    row_of = {place: i for i, row in enumerate(rows) for place in row}
    many_branches = len({visit["branch"] for visit in visits}) > 1
    by_branch = places[0][1] is not None
    cells = [[Cell() for _ in range(math.ceil(span / stride))] for _ in rows]
    for visit in visits:
        place = (visit["site"], visit["branch"] if by_branch else None)
        cells[row_of[place]][(visit["step"] - first) // stride].add(visit)
    labels = [_label(row, many_branches and by_branch) for row in rows]
    ages = [c.age for row in cells for c in row]
    return Grid(run, labels, cells, first, stride, max(ages, default=1))


def _places(visits: list[Data], order: list[str]) -> list[tuple[str, str | None]]:
    """(site, branch) in the order of the sites; without branches where these are too many rows."""
    seen = dict.fromkeys((visit["site"], visit["branch"]) for visit in visits)
    sites = dict.fromkeys(site for site, _ in seen)
    names = [site for site in order if site in sites]
    names += [site for site in sites if site not in names]
    if len(seen) <= _ROWS:
        return [place for site in names for place in seen if place[0] == site]
    return [(site, None) for site in names]


def _label(row: list[tuple[str, str | None]], branches: bool) -> str:
    site, branch = row[0]
    text = f"{site}, {branch}" if branches else site
    if len(row) > 1:
        half = _LABEL // 2 - 2
        return f"{shortened(site, half)} … {shortened(row[-1][0], half)}"
    return shortened(text, _LABEL)


def title(data: Data, of: Grid) -> str:
    models = ", ".join(data["models"].values())
    return f"{models}: {' + '.join(data['policies'])}" + (f" (run {of.run})" if of.run else "")


def png(data: Data) -> bytes:
    """The map as a picture; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    of = grid(data)
    count, width = len(of.labels), len(of.cells[0])
    figure = Figure(figsize=(11, 1.9 + 0.24 * max(count, 3)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(
        [[cell.colour(of.oldest) for cell in row] for row in of.cells],
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_yticks(range(count), of.labels, fontsize=8, family="monospace")
    ticks = of.ticks()
    axes.set_xticks([i for i, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.set_xlabel("step" if of.stride == 1 else f"step ({of.stride} a column)", fontsize=9)
    if width <= 80:
        axes.set_xticks([i + 0.5 for i in range(width - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(count - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(which="major", length=2)
    for side in axes.spines.values():
        side.set_visible(False)
    for i, share in enumerate(of.shares()):
        axes.text(
            width - 0.3,
            i,
            percent(share),
            va="center",
            fontsize=8,
            family="monospace",
            clip_on=False,
        )
    corner = (width - 0.3, -0.5)
    above = (0, 4)  # points
    axes.annotate(
        "skipped", corner, above, textcoords="offset points", fontsize=8, annotation_clip=False
    )
    axes.set_title(shortened(title(data, of), 110), fontsize=9, loc="left", pad=16)
    handles = [Patch(color=_hex(colour), label=text) for text, colour in of.legend()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def svg(data: Data) -> str:
    """The map as an inline SVG, without matplotlib."""
    of = grid(data)
    count, width = len(of.labels), len(of.cells[0])
    cell, height, left = max(4.0, min(24.0, 640 / width)), 18, 10 + 7 * max(map(len, of.labels))
    right = left + cell * width
    total = max(right + 70, 620)
    bottom = 24 + height * count
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:.0f} {bottom + 60}" '
        f'width="{total:.0f}" role="img" font-family="monospace" font-size="11">'
    ]
    for y, (label, row, share) in enumerate(zip(of.labels, of.cells, of.shares(), strict=True)):
        top = 24 + y * height
        parts.append(_text(left - 6, top + 13, label, "end"))
        parts.append(_text(right + 6, top + 13, percent(share)))
        for x, one in enumerate(row):
            note = f"{label}, step {of.first + x * of.stride}: {_says(one)}"
            parts.append(
                f'<rect x="{left + x * cell:.1f}" y="{top}" width="{cell - 0.8:.1f}" '
                f'height="{height - 1}" fill="{_hex(one.colour(of.oldest))}">'
                f"<title>{html.escape(note)}</title></rect>"
            )
    parts.append(_text(right + 6, 16, "skipped"))
    parts += [_text(left + (x + 0.5) * cell, bottom + 13, text, "middle") for x, text in of.ticks()]
    parts.append(_text(left - 6, bottom + 13, "step", "end"))
    x = 10.0
    for text, colour in of.legend():
        parts.append(
            f'<rect x="{x:.0f}" y="{bottom + 32}" width="12" height="12" fill="{_hex(colour)}"/>'
        )
        parts.append(_text(x + 16, bottom + 42, text))
        x += 34 + 7 * len(text)
    return "".join([*parts, "</svg>"])


def _says(cell: Cell) -> str:
    if not cell.visits:
        return "not visited"
    if cell.left_out == 0.0:
        return "computed"
    return f"skipped, age {cell.age}" if cell.share == 1.0 else f"{percent(cell.share)} skipped"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{c:02x}" for c in colour)
