"""What happened in a session, gathered from its records, tally and trace into plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from accelerate_hooks.audit import worst
from accelerate_hooks.site import Effect

if TYPE_CHECKING:
    from accelerate_hooks.frame import Root
    from accelerate_hooks.session import Session
    from accelerate_hooks.site import Site

SCHEMA = 1
_PACKAGES = ("accelerate-hooks", "torch", "transformers", "diffusers")
_COUNTED = ("share_left_out", "flops_saved", "true_error")
_ACTIONS = {"run": "computed", "skip": "skipped", "rows": "partly"}

Data = dict[str, Any]


def survey(session: Session, run: int | None = None) -> Data:
    """Everything that a report shows, as JSON-able data; of one run where its number is given."""
    if session.audit is not None:
        session.audit.settle(session)
    done = steps(session, run)
    by_site: dict[str, list[Data]] = {}
    for visit in done:
        by_site.setdefault(visit["site"], []).append(visit)
    lines = [
        _line(session, root, site, by_site.get(site.name, []), run)
        for root, site in _sites(session)
    ]
    summaries = [s for s in list(session.tally.recent) if run is None or s.number == run]
    totals = _totals(session, lines, summaries, run)
    for line in lines:
        line["flops_share"] = _share(line["flops_saved"], totals["flops_plain"])
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "run": run,
        "policies": [str(policy) for policy in session.policies],
        "models": {root.name or "model": root.class_name for root in session.roots},
        "active": session.active,
        "notes": list(session.notes),
        "inert_forwards": dict(session.inert_forwards),
        "runs": {
            "count": session.tally.runs if run is None else len(summaries),
            "signals": session.tally.signals()
            if run is None
            else dict(Counter(s.signal for s in summaries)),
            "ambiguous": session.tally.ambiguous()
            if run is None
            else {s.ambiguous: 1 for s in summaries if s.ambiguous},
            "latest": [asdict(summary) for summary in summaries],
        },
        "totals": totals,
        "equal_cost": _equal_cost(summaries),
        "caches": _caches(session),
        "audit": _audit(session, done, run),
        "sites": lines,
        "never": _never(session, lines, totals),
        "idle": _idle(session) if run is None else [],
        "steps_complete": len(session.trace) < session.trace.capacity,
        "steps": done,
    }


def versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def steps(session: Session, run: int | None = None) -> list[Data]:
    """The trace by visits: what was done, with the reasons noted on the way, and the age of what
    was reused, in steps since the site was last computed."""
    watched = {site.name for _, site in _sites(session)}
    visits: list[Data] = []
    open_: dict[tuple[Any, ...], Data] = {}
    computed_at: dict[tuple[Any, ...], int] = {}
    for entry in session.trace:
        if entry.site not in watched or (run is not None and entry.run != run):
            continue
        key = (entry.run, entry.step, entry.branch, entry.site)
        visit: Data | None = open_.get(key)
        action = _ACTIONS.get(entry.action)
        if visit is None or (action is not None and visit["action"] is not None):
            visit = dict(zip(("run", "step", "branch", "site"), key, strict=True))
            visit |= {"action": None, "reason": None, "age": None, "numbers": {}}
            open_[key] = visit
            visits.append(visit)
        if entry.reason is not None:
            reasons = [visit["reason"]] if visit["reason"] else []
            visit["reason"] = "; ".join([*reasons, entry.reason])
        visit["numbers"].update(entry.numbers or {})
        if action is not None:
            visit["action"] = action
            place = (entry.run, entry.branch, entry.site)
            if action == "skipped" and place in computed_at:
                visit["age"] = entry.step - computed_at[place]
            elif action != "skipped":
                computed_at[place] = entry.step
    return [visit for visit in visits if visit["action"] is not None]


def _sites(session: Session) -> list[tuple[Root, Site]]:
    """The sites at which a policy acts, in the order of the modules."""
    return [(r, site) for r in session.roots for site in r.sites if session.policies_at(site)]


def _line(session: Session, root: Root, site: Site, done: list[Data], run: int | None) -> Data:
    mine = [v for v in done if not root.name or v["branch"].split(" ")[0] == root.name]
    record = session.record(site)
    actions = Counter(visit["action"] for visit in mine)
    if run is None:
        computed, skipped, partly = record.computed - record.partly, record.skipped, record.partly
        rows, flops, uncounted = record.rows_left_out, record.saved_flops, record.uncounted
    else:
        computed, skipped, partly = (actions[a] for a in ("computed", "skipped", "partly"))
        rows = sum(v["numbers"].get("share_left_out", 0.0) for v in mine)
        flops = sum(v["numbers"].get("flops_saved", 0) for v in mine)
        left_out = [v for v in mine if v["action"] != "computed"]
        uncounted = sum("flops_saved" not in v["numbers"] for v in left_out)
    visits = computed + skipped + partly
    seconds = record.mean_seconds()
    errors = [v["numbers"]["true_error"] for v in mine if "true_error" in v["numbers"]]
    return {
        "site": f"{root.name}.{site.name}" if root.name and site.path else root.name or site.name,
        "root": root.name,
        "kind": site.kind,
        "stack": site.stack,
        "visits": visits,
        "computed": computed,
        "skipped": skipped,
        "partly": partly,
        "rows_left_out": rows,
        "share_skipped": _share(skipped + rows, visits),
        "why_skipped": _reasons(mine, "skipped", "partly"),
        "why_computed": _reasons(mine, "computed"),
        "means_partly": _means(mine),
        "max_age": max((v["age"] for v in mine if v["age"] is not None), default=None),
        "flops_saved": flops,
        "uncounted": uncounted,
        "ms_a_visit": seconds * 1e3 if seconds else None,
        "ms_saved": (skipped + rows) * seconds * 1e3 if seconds else None,
        "audit": {
            "count": len(errors),
            "mean": sum(errors) / len(errors) if errors else None,
            "max": worst(*errors) if errors else None,
        },
    }


def _reasons(visits: list[Data], *actions: str) -> dict[str, int]:
    found = Counter(v["reason"] for v in visits if v["action"] in actions and v["reason"])
    return dict(found.most_common(8))


def _means(visits: list[Data]) -> dict[str, float]:
    """The mean of every number that was noted at visits which were computed in part."""
    found: dict[str, list[float]] = {}
    for visit in visits:
        if visit["action"] == "partly":
            for name, value in visit["numbers"].items():
                if name not in _COUNTED:
                    found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _totals(session: Session, lines: list[Data], summaries: list[Any], run: int | None) -> Data:
    tally = session.tally
    visits = sum(line["visits"] for line in lines)
    left_out = sum(line["skipped"] + line["rows_left_out"] for line in lines)
    known = [line["ms_saved"] for line in lines if line["ms_saved"] is not None]
    uncounted = sum(line["uncounted"] for line in lines)
    if run is None:
        forwards, reads = session.forwards, session.host_reads
        plain, unknown = tally.plain_flops, tally.uncounted_forwards
        looks, beside = tally.looks, tally.look_flops
    else:
        forwards = sum(s.forwards for s in summaries)
        reads = sum(s.host_reads for s in summaries)
        plain = sum(s.plain_flops for s in summaries)
        looks, beside = (
            sum(n) for n in zip(*((s.looks, s.look_flops) for s in summaries), strict=True)
        )
        unknown = sum(s.uncounted for s in summaries) and forwards
    complete = plain > 0 and not unknown and not uncounted
    return {
        "forwards": forwards,
        "looks": looks,
        "visits": visits,
        "skipped": sum(line["skipped"] for line in lines),
        "partly": sum(line["partly"] for line in lines),
        "share_skipped": _share(left_out, visits),
        "flops_saved": sum(line["flops_saved"] for line in lines) - beside,
        "flops_plain": plain if complete else None,
        "uncounted_visits": uncounted,
        "uncounted_forwards": unknown,
        "ms_saved": sum(known) if known else None,
        "host_reads": reads,
        "host_reads_a_forward": _share(reads, forwards),
    }


def _share(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def _equal_cost(summaries: list[Any]) -> Data | None:
    """How many plain steps cost as much as the denoising runs did: ``steps * computed / plain``,
    the mean over the runs; None without such runs or with FLOPs that are not known."""
    runs = [s for s in summaries if s.phase == "denoise" and s.steps]
    if not runs or any(s.uncounted or not s.plain_flops for s in runs):
        return None
    cost = [s.steps * (1.0 - s.saved_flops / s.plain_flops) for s in runs]
    return {
        "runs": len(runs),
        "steps": sum(s.steps for s in runs) / len(runs),
        "equal_steps": sum(cost) / len(runs),
    }


def _caches(session: Session) -> Data:
    caps = {
        str(policy): cap
        for policy in session.policies
        if (cap := getattr(policy, "max_cache_bytes", None)) is not None
    }
    return {
        "bytes_now": session.tally.bytes_now(),
        "bytes_peak": session.tally.peak_bytes,
        "max_cache_bytes": caps,
        "cap_hit": session.dropped_for_bytes,
    }


def _audit(session: Session, done: list[Data], run: int | None) -> Data | None:
    audit = session.audit
    if audit is None:
        return None
    if run is None:
        kept = list(audit.errors.values())
        count, total = sum(e.count for e in kept), sum(e.sum for e in kept)
        largest = worst(*(e.max for e in kept)) if kept else None
    else:
        errors = [v["numbers"]["true_error"] for v in done if "true_error" in v["numbers"]]
        count, total = len(errors), sum(errors)
        largest = worst(*errors) if errors else None
    return {
        "every": audit.every,
        "count": count,
        "mean": total / count if count else None,
        "max": largest,
        "left_out": dict(audit.left_out),
    }


def _idle(session: Session) -> list[str]:
    """The policies that could skip and did not, where others did."""
    could = {
        index
        for _, site in _sites(session)
        if (record := session.record(site)).computed + record.skipped
        for index, policy in session.policies_at(site)
        if policy.acts(site) - {Effect.OBSERVE}
    }
    if not any(session.skips.values()):
        return []
    return [str(session.policies[i]) for i in sorted(could) if not session.skips.get(i)]


def _never(session: Session, lines: list[Data], totals: Data) -> str | None:
    """Why nothing was skipped, in words; None where something was or nothing was meant to be."""
    if totals["skipped"] or totals["partly"]:
        return None
    inert = [f"{why} ({n} forwards)" for why, n in session.inert_forwards.items()]
    if not totals["forwards"]:
        if inert:
            return f"every forward was computed plainly: {'; '.join(inert)}"
        return "no forward yet" if session.active else "the session is inert, nothing was watched"
    skipping = any(
        policy.acts(site) - {Effect.OBSERVE}
        for _, site in _sites(session)
        for _, policy in session.policies_at(site)
    )
    if not skipping:
        return None if lines else "no policy acts at any site of this model"
    why: Counter[str] = Counter()
    for line in lines:
        why.update(line["why_computed"])
    reasons = [f"{reason} ({n} visits)" for reason, n in why.most_common(3)]
    reasons += [f"{r} ({n} runs)" for r, n in session.tally.ambiguous().items()]
    if session.dropped_for_bytes:
        times = session.dropped_for_bytes
        reasons.append(f"max_cache_bytes was passed and what was kept dropped ({times} times)")
    longest = max((s.steps for s in list(session.tally.recent)), default=0)
    if not reasons:
        reasons = [f"the policies chose to compute every visit (longest run: {longest} steps)"]
    return "; ".join([*reasons, *inert])
