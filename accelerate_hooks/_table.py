"""A report as text, under 100 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

Data = dict[str, Any]
WIDTH = 99
_LINES = 12  # above this many, sites are shown by stack and kind
_HEAD = 12
_LEGEND = (
    "A visit is one call of a part of the model in one step. A skipped visit was not computed: its "
    "output was reused or predicted from visits that were, at most `age` steps earlier. `partly`: "
    "some rows of the batch, or a part of the work, were left out. FLOPs: matrix products, "
    "convolutions and attention."
)


def render(data: Data) -> str:
    """The text of a report."""
    lines = ["accelerate_hooks report" + (f", run {data['run']}" if data["run"] else "")]
    for name, text in header(data):
        lines += field(name, text)
    if data["sites"]:
        lines += ["", *site_table(grouped(data["sites"]))]
    lines.append("")
    for name, text in footer(data):
        lines += field(name, text)
    if data["sites"]:
        lines += ["", *textwrap.wrap(_LEGEND, WIDTH)]
    return "\n".join(lines)


def field(name: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - _HEAD, break_long_words=True, break_on_hyphens=False) or [
        ""
    ]
    return [f"{name if i == 0 else '':<{_HEAD}}{line}" for i, line in enumerate(lines)]


def header(data: Data) -> Iterable[tuple[str, str]]:
    """What ran."""
    runs, totals = data["runs"], data["totals"]
    yield "policy", " + ".join(data["policies"]) or "none"
    models = data["models"].items()
    yield "model", ", ".join(c if n == "model" else f"{n}: {c}" for n, c in models) or "none"
    signals = ", ".join(f"{name} ({n})" for name, n in runs["signals"].items())
    forwards = f"{_many(totals['forwards'], 'forward')} in {_many(runs['count'], 'run')}"
    yield "seen", forwards + (f"; runs were recognised by: {signals}" if signals else "")
    for why, n in runs["ambiguous"].items():
        yield "ambiguous", f"{_many(n, 'run')} computed in full: {why}"
    for why, n in data["inert_forwards"].items():
        yield "inert", f"{_many(n, 'forward')} computed plainly: {why}"
    for note in data["notes"]:
        yield "note", note


def footer(data: Data) -> Iterable[tuple[str, str]]:
    """What it came to."""
    totals, caches, audit = data["totals"], data["caches"], data["audit"]
    if data["never"]:
        yield "skipped", f"never skipped because: {data['never']}"
    elif totals["visits"]:
        share = percent(totals["share_skipped"])
        yield "skipped", f"{share} of {_many(totals['visits'], 'visit')}"
    for policy in data["idle"]:
        yield "idle", f"{policy} skipped nothing"
    if totals["visits"]:
        yield "FLOPs", flops_text(totals)
        if totals["looks"]:
            yield (
                "beside",
                f"{_many(totals['looks'], 'forward')} to learn what blocks hand on, once a "
                "session; taken off what was saved",
            )
        if data["equal_cost"]:
            cost = data["equal_cost"]
            many = f", mean of {cost['runs']} runs" if cost["runs"] > 1 else ""
            yield (
                "equal cost",
                f"{cost['equal_steps']:.1f} of {cost['steps']:.4g} steps: as many plain steps "
                f"would have cost the same{many}",
            )
        if totals["ms_saved"]:
            yield (
                "time",
                f"{milliseconds(totals['ms_saved'])} saved, estimated: skipped visits x mean time "
                "of a computed one",
            )
    yield "caches", cache_text(caches)
    if totals["forwards"]:
        each = totals["host_reads_a_forward"]
        yield "host reads", f"{totals['host_reads']}, {each:.2f} a forward"
    if audit is not None:
        yield "audit", audit_text(audit)
    if not data["steps_complete"]:
        yield "trace", "full: reasons, ages and step details are those of its latest entries"


def flops_text(totals: Data) -> str:
    unknown = []
    if totals["uncounted_forwards"]:
        unknown.append(f"{totals['uncounted_forwards']} of {_many(totals['forwards'], 'forward')}")
    if totals["uncounted_visits"]:
        unknown.append(_many(totals["uncounted_visits"], "skipped visit"))
    saved = flops(totals["flops_saved"])
    if totals["flops_plain"] is not None:
        share = percent(totals["flops_saved"] / totals["flops_plain"])
        whole = flops(totals["flops_plain"])
        return f"{saved} operations saved, {share} of the {whole} of the plain model"
    why = f"unknown for {' and '.join(unknown) or 'all forwards'} (compiled, or never counted)"
    return f"at least {saved} operations saved; {why}" if totals["flops_saved"] else why


def cache_text(caches: Data) -> str:
    now, peak = size(caches["bytes_now"]), size(caches["bytes_peak"])
    text = f"{now} now, {peak} at the peak of a run; "
    if not caches["max_cache_bytes"]:
        return text + "no cap (max_cache_bytes is not set)"
    caps = " and ".join(size(cap) for cap in caches["max_cache_bytes"].values())
    return f"{text}max_cache_bytes = {caps}, hit {_many(caches['cap_hit'], 'time')}"


def audit_text(audit: Data) -> str:
    text = f"one of {audit['every']} skipped visits recomputed: "
    if audit["count"]:
        text += (
            f"true relative error {audit['mean']:.2e} mean, {audit['max']:.2e} at most, over "
            f"{_many(audit['count'], 'visit')}"
        )
    else:
        text += "none yet"
    for why, n in audit["left_out"].items():
        text += f"; {_many(n, 'visit')} not audited: {why}"
    return text


def grouped(sites: list[Data]) -> list[Data]:
    """One line a site, or a stack and kind where there are many."""
    if len(sites) <= _LINES:
        return sites
    groups: dict[tuple[str, str, str], list[Data]] = {}
    for line in sites:
        groups.setdefault((line["root"], line["stack"], line["kind"]), []).append(line)
    return [_merged(lines) for lines in groups.values()]


def _merged(lines: list[Data]) -> Data:
    if len(lines) == 1:
        return lines[0]
    first = lines[0]
    place = ".".join(p for p in (first["root"], first["stack"], "*") if p)
    out = dict(first, site=f"{place} {first['kind']} ({len(lines)})")
    for key in ("visits", "computed", "skipped", "partly", "rows_left_out", "flops_saved"):
        out[key] = sum(line[key] for line in lines)
    names = {name for line in lines for name in line["means_partly"]}
    out["means_partly"] = {name: _weighted(lines, name) for name in sorted(names)}
    for key in ("flops_share", "ms_saved", "max_age"):
        known = [line[key] for line in lines if line[key] is not None]
        out[key] = (max(known) if key == "max_age" else sum(known)) if known else None
    for key in ("why_skipped", "why_computed"):
        out[key] = dict(sum((Counter(line[key]) for line in lines), Counter()).most_common(8))
    left_out = out["skipped"] + out["rows_left_out"]
    out["share_skipped"] = left_out / out["visits"] if out["visits"] else None
    out["uncounted"] = sum(line["uncounted"] for line in lines)
    return out


def _weighted(lines: list[Data], name: str) -> float:
    """The mean over the visits of several sites."""
    told = [
        (line["partly"], line["means_partly"][name])
        for line in lines
        if name in line["means_partly"]
    ]
    return sum(n * value for n, value in told) / sum(n for n, _ in told)


def columns(lines: list[Data]) -> list[tuple[str, list[str]]]:
    """The table of sites by columns, the site's name first."""
    partly = any(line["partly"] for line in lines)
    table = [
        ("site", [line["site"] for line in lines]),
        ("computed", [f"{line['computed']:,}" for line in lines]),
        ("skipped", [f"{line['skipped']:,}" for line in lines]),
        ("partly", [f"{line['partly']:,}" for line in lines]),
        ("share", [percent(line["share_skipped"]) for line in lines]),
        ("age", ["-" if line["max_age"] is None else str(line["max_age"]) for line in lines]),
        ("FLOPs saved", [_saved(line) for line in lines]),
        ("of model", [percent(line["flops_share"]) for line in lines]),
        ("est. saved", [milliseconds(line["ms_saved"]) for line in lines]),
    ]
    return [column for column in table if partly or column[0] != "partly"]


def site_table(lines: list[Data]) -> list[str]:
    table = columns(lines)
    widths = [max(len(head), *map(len, cells)) for head, cells in table]
    widths[0] = min(widths[0], WIDTH - sum(w + 2 for w in widths[1:]))
    out = [_row([head for head, _ in table], widths)]
    out.append("-" * len(out[0]))
    for i, line in enumerate(lines):
        cells = [cells[i] for _, cells in table]
        if len(cells[0]) > widths[0]:
            out.append(shortened(cells[0], WIDTH))
            cells[0] = ""
        out.append(_row(cells, widths))
        if text := why(line):
            out += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="      ")
    return out


def why(line: Data) -> str:
    """The top reasons of a site's decisions, and the means of what was noted at them."""
    parts = [
        f"{did}: {top(line[key])}"
        for did, key in (("skipped", "why_skipped"), ("computed", "why_computed"))
        if line[key]
    ]
    parts += [f"{name} {value:.3g}" for name, value in line["means_partly"].items()]
    return "; ".join(parts)


def _row(cells: list[str], widths: list[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *numbers])


def top(reasons: Data, n: int = 2) -> str:
    shown = [f"{reason} ({count})" for reason, count in list(reasons.items())[:n]]
    more = len(reasons) - n
    return ", ".join([*shown, f"{more} more"] if more > 0 else shown)


def shortened(text: str, width: int) -> str:
    """Cut out of the middle, since both ends of a path say most."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _saved(line: Data) -> str:
    if line["uncounted"]:
        return f">= {flops(line['flops_saved'])}" if line["flops_saved"] else "unknown"
    return flops(line["flops_saved"])


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def flops(n: float) -> str:
    return _scaled(n, 1000.0, ("", "k", "M", "G", "T", "P", "E")) if n else "0"


def size(n: float) -> str:
    return _scaled(n, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(n: float, base: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(n) < base:
            return f"{n:.4g} {unit}".strip() if n >= 100 else f"{n:.3g} {unit}".strip()
        n /= base
    return f"{n:.4g} {units[-1]}"


def milliseconds(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms / 1e3:,.1f} s" if ms >= 10_000 else f"{ms:,.1f} ms"


def _many(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"
