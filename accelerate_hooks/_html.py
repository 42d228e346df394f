"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from accelerate_hooks import _heatmap, _table

Data = dict[str, Any]
_RUNS = 20  # of which the trace is summarised
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 68rem;
       padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left; font-family: monospace }
td.why { text-align: left; color: #555; border-bottom: 1px solid #bbb }
dl { display: grid; grid-template-columns: 8rem 1fr; gap: .2rem 1rem } dd { margin: 0 }
dt { color: #555 } figure { overflow-x: auto; margin: 1rem 0 } footer { color: #777 }
""".strip()


def page(data: Data) -> bytes:
    """The page, UTF-8."""
    one = f", run {data['run']}" if data["run"] else ""
    body = [
        f"<h1>accelerate_hooks report{one}</h1>",
        _pairs([*_table.header(data), *_table.footer(data)]),
    ]
    if data["steps"]:
        grid = _heatmap.grid(data)
        body += [
            f"<h2>Steps and sites of run {grid.run}</h2>",
            f"<figure>{_heatmap.svg(data)}</figure>",
        ]
    if data["sites"]:
        body += ["<h2>Sites</h2>", _sites(data["sites"]), f"<p>{escape(_table._LEGEND)}</p>"]
    if data["steps"]:
        body += ["<h2>Trace</h2>", _trace(data)]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    body.append(f"<footer><p>{escape(versions)}</p></footer>")
    title = f"accelerate_hooks: {' + '.join(data['policies'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{_STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
    ).encode()


def _pairs(pairs: list[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f"<dl>{items}</dl>"


def _table_of(heads: list[str], rows: list[list[str]], notes: list[str] | None = None) -> str:
    out = ["<table><tr>", *(f"<th>{escape(head)}</th>" for head in heads), "</tr>"]
    for i, row in enumerate(rows):
        out += ["<tr>", *(f"<td>{escape(cell)}</td>" for cell in row), "</tr>"]
        if notes and notes[i]:
            out.append(f'<tr><td class="why" colspan="{len(heads)}">{escape(notes[i])}</td></tr>')
    return "".join([*out, "</table>"])


def _sites(lines: list[Data]) -> str:
    columns = _table.columns(lines)
    rows = [[cells[i] for _, cells in columns] for i in range(len(lines))]
    return _table_of([head for head, _ in columns], rows, [_table.why(line) for line in lines])


def _trace(data: Data) -> str:
    """One line a run and branch, the latest last."""
    runs: dict[tuple[int, str], list[Data]] = {}
    for visit in data["steps"]:
        runs.setdefault((visit["run"], visit["branch"]), []).append(visit)
    rows: list[list[str]] = []
    for (run, branch), visits in list(runs.items())[-_RUNS:]:
        done = Counter(visit["action"] for visit in visits)
        steps = len({visit["step"] for visit in visits})
        ages = [visit["age"] for visit in visits if visit["age"] is not None]
        errors = [v["numbers"]["true_error"] for v in visits if "true_error" in v["numbers"]]
        counts = [str(done[action]) for action in ("computed", "skipped", "partly")]
        age = str(max(ages)) if ages else "-"
        error = f"{max(errors):.2e}" if errors else "-"
        rows.append([f"run {run}, {branch}", str(steps), *counts, age, error])
    left = len(runs) - len(rows)
    heads = ["run and branch", "steps", "computed", "skipped", "partly", "age", "true error, max"]
    more = f"<p>{left} earlier ones are in the .json.</p>" if left else ""
    return _table_of(heads, rows) + more
