"""What a session says of itself is what happened."""

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import TINY

from accelerate_hooks import Effect, InertWarning, Policy, SpecError, enable
from accelerate_hooks._heatmap import grid
from accelerate_hooks.errors import AccelerateHooksError
from accelerate_hooks.site import Site

WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Every(Policy):
    """Computes every n-th step and leaves the sites of `kind` out of the others."""

    name: ClassVar[str] = "every"
    n: int = 3
    kind: str = "block"
    reason: str = "not its turn"
    reads: bool = False
    keep: int = 0
    max_cache_bytes: int | None = None

    @classmethod
    def exact(cls) -> "Every":
        return cls(n=1)

    @property
    def kinds(self) -> Any:
        return (self.kind,)

    def around(self, call: Any) -> Any:
        if self.keep:
            call.slot(lambda: torch.zeros(self.keep, dtype=torch.uint8))
        if self.reads and call.site.index == 0:
            call.read(call.x.mean())
        if call.step.index % self.n:
            call.note(self.reason)
            return call.skip()
        call.note("its turn")
        return call.proceed()


@dataclass(frozen=True, kw_only=True)
class Quiet(Every):
    """Only proceeds."""

    name: ClassVar[str] = "quiet"

    def around(self, call: Any) -> Any:
        return call.proceed()


@dataclass(frozen=True, kw_only=True)
class HalfOfTheRows(Every):
    """Leaves out every row but the first, from the second step on."""

    name: ClassVar[str] = "half_of_the_rows"

    def around(self, call: Any) -> Any:
        return call.proceed(rows=[True, call.step.index < 1])


@dataclass(frozen=True, kw_only=True)
class Looks(Every):
    name: ClassVar[str] = "looks"

    def acts(self, site: Site) -> Any:
        return frozenset({Effect.OBSERVE})

    def around(self, call: Any) -> Any:
        return call.proceed()


def generate(model: Any, name: str = "dit", steps: int = 6, branches: int = 1) -> torch.Tensor:
    """A short denoising loop; the sum of its outputs."""
    items = [TINY[name].inputs(2) for _ in range(branches)]
    total = torch.zeros(())
    with torch.no_grad():
        for time in torch.linspace(9, 1, steps):
            for given in items:
                out = model(**dict(given, timestep=time.expand(2)))
                total = total + (out[0] if isinstance(out, tuple) else out.sample)
    return total


@pytest.fixture(scope="module")
def dit() -> Any:
    return TINY["dit"].build()


@pytest.fixture(scope="module")
def flux() -> Any:
    return TINY["flux"].build()


def test_the_numbers_are_what_happened(dit: Any) -> None:
    with enable(dit, Every(reads=True)) as session:
        generate(dit, steps=6, branches=2)
        data = session.report().to_dict()
    assert [line["skipped"] for line in data["sites"]] == [8] * 4
    assert [line["computed"] for line in data["sites"]] == [4] * 4
    assert data["totals"]["visits"] == 48
    assert data["totals"]["share_skipped"] == pytest.approx(2 / 3)
    assert data["totals"]["forwards"] == 12
    assert data["totals"]["host_reads"] == 12
    assert data["runs"]["count"] == 1
    assert data["runs"]["signals"] == {"timestep": 1}
    saved = sum(line["flops_saved"] for line in data["sites"])
    assert saved == data["totals"]["flops_saved"] > 0
    plain = data["totals"]["flops_plain"]
    assert data["equal_cost"]["steps"] == 6
    assert data["equal_cost"]["equal_steps"] == pytest.approx(6 * (1 - saved / plain))
    assert 2 < data["equal_cost"]["equal_steps"] < 3  # the blocks are most of the model
    assert data["sites"][0]["max_age"] == 2
    assert data["sites"][0]["why_skipped"] == {"not its turn": 8}
    assert data["never"] is None
    json.dumps(data, allow_nan=False)


def test_the_flops_of_a_plain_forward_are_those_of_the_model(dit: Any) -> None:
    with enable(dit, Every(kind="model")) as session:
        generate(dit, steps=6)
        totals = session.report().to_dict()["totals"]
    assert totals["flops_saved"] * 3 == totals["flops_plain"] * 2
    with enable(dit, Every()) as session:
        generate(dit, steps=6)
        assert session.report().to_dict()["totals"]["flops_plain"] == totals["flops_plain"]


def test_the_text(flux: Any) -> None:
    with enable(flux, Every(max_cache_bytes=10**6, keep=100)) as session:
        generate(flux, "flux", steps=6, branches=2)
        text = str(session.report())
    assert max(map(len, text.splitlines())) < WIDTH
    for said in (
        "every:keep=100,max_cache_bytes=1000000",
        "FluxTransformer2DModel",
        "12 forwards in 1 run",
        "recognised by: timestep (1)",
        "skipped: not its turn (8)",
        "66.7%",
        "of 6 steps",
        "estimated",
        "max_cache_bytes = 976.6 KiB, hit 0 times",
        "host reads  0, 0.00 a forward",
    ):
        assert said in text, said


def test_many_sites_are_shown_by_stack_and_kind(flux: Any) -> None:
    with enable(flux, [Every(kind="attention"), Every(kind="mlp")]) as session:
        generate(flux, "flux", steps=3)
        report = session.report()
    assert len(report.to_dict()["sites"]) > 12
    text = str(report)
    assert "transformer_blocks.* attention (4)" in text
    assert max(map(len, text.splitlines())) < WIDTH


def test_steps_and_ages(dit: Any) -> None:
    with enable(dit, Every(), only="*.1") as session:
        generate(dit, steps=5)
        steps = session.report().steps
    assert [step["action"] for step in steps] == [
        "computed", "skipped", "skipped", "computed", "skipped",
    ]  # fmt: skip
    assert [step["age"] for step in steps] == [None, 1, 2, None, 1]
    assert {step["site"] for step in steps} == {"transformer_blocks.1"}
    assert steps[1]["reason"] == "not its turn"
    assert steps[1]["numbers"]["flops_saved"] > 0


def test_one_run_of_several(dit: Any) -> None:
    with enable(dit, Every()) as session:
        generate(dit, steps=6)
        session.reset()
        generate(dit, steps=3)
        numbers = session.trace.runs()
        whole = session.report().to_dict()
        parts = [session.report(run=number).to_dict() for number in numbers]
        with pytest.raises(AccelerateHooksError, match="there is no run 99999"):
            session.report(run=99999)
    assert [part["totals"]["forwards"] for part in parts] == [6, 3]
    for key in ("visits", "skipped", "flops_saved", "flops_plain"):
        assert sum(part["totals"][key] for part in parts) == whole["totals"][key]
    assert [part["equal_cost"]["steps"] for part in parts] == [6, 3]
    assert f"report, run {numbers[0]}" in str(session.report(run=numbers[0]))


def test_rows_are_left_out_in_part(dit: Any) -> None:
    with enable(dit, HalfOfTheRows(), only="*.2") as session:
        generate(dit, steps=5)
        report = session.report()
    (line,) = report.to_dict()["sites"]
    assert (line["computed"], line["partly"], line["skipped"]) == (1, 4, 0)
    assert line["share_skipped"] == pytest.approx(2 / 5)
    assert "partly" in str(report)


def test_nothing_to_report(dit: Any) -> None:
    with enable(dit, Every()) as session:
        assert "never skipped because: no forward yet" in str(session.report())
        with pytest.warns(UserWarning, match="inert"), torch.enable_grad():
            dit(**TINY["dit"].inputs(1))
        text = str(session.report())
        assert "every forward was computed plainly: gradients are on" in " ".join(text.split())
    with enable(dit, Every.exact()) as session:
        generate(dit, steps=3)
        assert "never skipped because: its turn (12 visits)" in str(session.report())
    with enable(dit, Looks()) as session:
        generate(dit, steps=3)
        assert session.report().to_dict()["never"] is None
    with enable(dit, Every(kind="router"), strict=False) as session:
        generate(dit, steps=3)
        text = str(session.report())
    assert "found no router site" in text


def test_unknown_flops_are_not_guessed(dit: Any) -> None:
    with enable(dit, Every()) as session:
        session.counting = False
        generate(dit, steps=6)
        data, text = session.report().to_dict(), str(session.report())
    assert data["totals"]["flops_plain"] is None
    assert data["equal_cost"] is None
    assert "unknown for 6 of 6 forwards and 16 skipped visits" in text
    assert "of 6 steps" not in text


def test_an_ambiguous_run_says_why(dit: Any) -> None:
    with enable(dit, Every()) as session, torch.no_grad():
        given = TINY["dit"].inputs(2)
        given["timestep"] = None
        with session.run(total=2) as run:
            run.ambiguous = "for the test"
            generate(dit, steps=2)
        assert "1 run computed in full: for the test" in str(session.report())


def test_a_cap_that_was_hit(dit: Any) -> None:
    with enable(dit, Every(keep=1000, max_cache_bytes=2000)) as session:
        with pytest.warns(InertWarning, match="max_cache_bytes=2000"):
            generate(dit, steps=3)
        caches = session.report().to_dict()["caches"]
    assert caches["cap_hit"] > 0
    assert caches["bytes_peak"] >= 4000


def test_ten_thousand_runs_do_not_grow() -> None:
    from types import SimpleNamespace

    from accelerate_hooks.run import Run, Step
    from accelerate_hooks.tally import Tally

    tally = Tally()
    for _ in range(1000):
        run = Run("timestep", index=0)
        step = Step(run, 0, None, "denoise", "main", "timestep")
        frame: Any = SimpleNamespace(
            step=step, reads=0, left_out=0, saved_flops=0, uncounted=0, looks=0
        )
        tally.forward(frame, "", 10)
    del run, step, frame
    assert tally.runs == 1000
    assert tally.signals() == {"timestep": 1000}
    assert len(tally.recent) <= 64
    assert len(tally._live) == 0


class TwoModels:
    """What a pipeline of two denoisers looks like."""

    components: ClassVar[dict[str, Any]] = {}
    scheduler = None

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = TINY["dit"].build(), TINY["dit"].build()


def test_two_models_are_told_apart() -> None:
    pipe = TwoModels()
    with enable(pipe, Every()) as session:
        generate(pipe.transformer, steps=3)
        generate(pipe.transformer_2, steps=6)
        data = session.report().to_dict()
    by_site = {line["site"]: line for line in data["sites"]}
    assert by_site["transformer.transformer_blocks.0"]["why_skipped"] == {"not its turn": 2}
    assert by_site["transformer_2.transformer_blocks.0"]["why_skipped"] == {"not its turn": 4}


# Saving


def test_json_and_html(dit: Any, tmp_path: Path) -> None:
    with enable(dit, Every(reason="<script>alert('&')</script>"), audit=2) as session:
        generate(dit, steps=6, branches=2)
        report = session.report()
    saved = json.loads(report.save(tmp_path / "r.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    page = report.save(tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    for outside in ("src=", "href=", "url(", "@import", "<link"):
        assert outside not in page
    picture = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    space = "{http://www.w3.org/2000/svg}"
    titles = [t.text or "" for t in picture.iter(f"{space}title")]
    assert len(titles) == 4 * 2 * 6  # blocks, branches, steps
    assert sum("skipped" in title for title in titles) == 32


def test_png(flux: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with enable(flux, Every()) as session:
        generate(flux, "flux", steps=4)
        path = session.report().save(tmp_path / "r.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_png_of_nothing(dit: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with enable(dit, Every()) as session:
        session.report().save(tmp_path / "r.png")
        session.report().save(tmp_path / "r.html")


def test_without_matplotlib(dit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with (
        enable(dit, Every()) as session,
        pytest.raises(AccelerateHooksError, match=r"pip install 'accelerate-hooks\[report\]'"),
    ):
        session.report().save(tmp_path / "r.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["r.txt", "r", "r.svg"])
def test_an_unknown_suffix(dit: Any, tmp_path: Path, name: str) -> None:
    with (
        enable(dit, Every()) as session,
        pytest.raises(AccelerateHooksError, match=r"\.json, \.html, \.png"),
    ):
        session.report().save(tmp_path / name)


@pytest.mark.parametrize("wrong", [None, 3, ["r.json"], "a\0.json"])
def test_a_report_is_saved_to_a_path(dit: Any, wrong: Any) -> None:
    with enable(dit, Every()) as session, pytest.raises(AccelerateHooksError, match="path"):
        session.report().save(wrong)


def test_numbers_that_are_not_finite_are_saved(dit: Any, tmp_path: Path) -> None:
    with enable(dit, Every(), audit=1) as session:
        given = TINY["dit"].inputs(2)
        given["hidden_states"][:] = float("nan")
        with torch.no_grad():
            for time in (3.0, 2.0):
                dit(**dict(given, timestep=torch.tensor([time, time])))
        path = session.report().save(tmp_path / "r.json")
    assert json.loads(path.read_text())["audit"]["mean"] == "nan"


def test_a_map_has_at_most_forty_rows() -> None:
    steps = [
        {"run": 1, "step": t, "branch": b, "site": f"blocks.{s}", "reason": None,
         "action": "skipped" if (s + t) % 2 else "computed", "age": 1 + t % 3, "numbers": {}}
        for t in range(500) for b in ("a", "b") for s in range(100)
    ]  # fmt: skip
    sites = [{"site": f"blocks.{s}"} for s in range(100)]
    found = grid({"steps": steps, "sites": sites, "run": None})
    assert len(found.labels) <= 40
    assert len(found.cells[0]) <= 120
    assert sum(cell.visits for row in found.cells for cell in row) == len(steps)
    assert found.shares() == pytest.approx([0.5] * len(found.labels))


# Audit


@pytest.mark.parametrize("name", ["dit", "flux"])
@pytest.mark.parametrize("kind", ["model", "block", "attention"])
def test_an_audited_run_is_bit_equal(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    outs, states = [], []
    draws = [m.register_forward_pre_hook(_draw) for m in model.transformer_blocks]
    try:
        for audit in (None, 1):
            torch.manual_seed(0)
            with enable(model, Every(kind=kind, n=2), audit=audit) as session:
                outs.append(generate(model, name, branches=2))
                reads = session.host_reads
                found = session.report().to_dict()
            states.append(torch.random.get_rng_state())
            assert reads == 0
    finally:
        for draw in draws:
            draw.remove()
    assert torch.equal(*outs)
    assert torch.equal(*states)
    assert found["audit"]["count"] == found["totals"]["skipped"] > 0
    assert found["totals"]["flops_plain"] is not None


def _draw(*_: Any) -> None:
    torch.rand(3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Remembers(Every):
    """Keeps what the skipped visits were given and what they gave."""

    name: ClassVar[str] = "remembers"
    seen: ClassVar[list[Any]] = []

    def around(self, call: Any) -> Any:
        if call.step.index % 2 == 0:
            return call.proceed()
        given = {k: v.clone() if hasattr(v, "clone") else v for k, v in call.arguments().items()}
        out = call.skip(call.x * 0.5 if call.site.kind != "model" else None)
        self.seen.append((call.site, given, call.outputs(out)))
        return out


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_the_error_is_that_of_a_computation_by_hand(
    name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    Remembers.seen.clear()
    with enable(model, Remembers(), audit=1) as session:
        generate(model, name, steps=4)
        report = session.report()
    errors: dict[str, list[float]] = {}
    for site, given, skipped in Remembers.seen:
        with torch.no_grad():
            true = site.module(**given)
        pair = (true[1], true[0]) if isinstance(true, tuple) else (true, None)
        pairs = [(a, b) for a, b in zip(skipped, pair, strict=True) if b is not None]
        off = sum(float((a - b).double().square().sum()) for a, b in pairs)
        norm = sum(float(b.double().square().sum()) for _, b in pairs)
        errors.setdefault(site.name, []).append((off / norm) ** 0.5)
    data = report.to_dict()
    assert data["audit"]["count"] == len(Remembers.seen) > 0
    for line in data["sites"]:
        mine = errors[line["site"]]
        assert line["audit"]["count"] == len(mine)
        assert line["audit"]["mean"] == pytest.approx(sum(mine) / len(mine), rel=1e-4)
        assert line["audit"]["max"] == pytest.approx(max(mine), rel=1e-4)
        listed = [
            step["numbers"]["true_error"]
            for step in report.steps
            if step["site"] == line["site"] and step["action"] == "skipped"
        ]
        assert listed == pytest.approx(mine, rel=1e-4)
    assert "true relative error" in str(report)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_one_of_n_is_audited_in_every_branch(dit: Any, every: int) -> None:
    with enable(dit, Every(n=30), only="*.1", audit=every) as session:
        generate(dit, steps=26, branches=2)
        report = session.report()
    assert report.to_dict()["audit"]["count"] == pytest.approx(50 / every, abs=1)
    audited = {s["branch"] for s in report.steps if "true_error" in s["numbers"]}
    assert len(audited) == 2


def test_nothing_to_audit_under_exact(dit: Any) -> None:
    with enable(dit, Every.exact(), audit=1) as session:
        generate(dit, steps=4)
        report = session.report()
    assert report.to_dict()["audit"]["count"] == 0
    assert "recomputed: none yet" in str(report)


def test_no_audit_beside_a_kv_cache() -> None:
    model, given = TINY["llama"].build(), TINY["llama"].inputs(2)
    with enable(model, Every(n=1), audit=1) as session, torch.no_grad():
        first = model(**dict(given, use_cache=True))
        length = first.past_key_values.get_seq_length()
    with enable(model, SecondHalf(), audit=1) as session, torch.no_grad():
        for _ in range(2):
            out = model(**dict(given, use_cache=True))
        assert out.past_key_values.get_seq_length() == length
        data = session.report().to_dict()
    assert data["totals"]["skipped"] > 0
    assert data["audit"]["count"] == 0
    (why,) = data["audit"]["left_out"]
    assert "KV cache" in why


@dataclass(frozen=True, kw_only=True)
class SecondHalf(Every):
    name: ClassVar[str] = "second_half"

    def around(self, call: Any) -> Any:
        return call.skip() if 2 * call.site.index >= call.site.count else call.proceed()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_a_wrong_audit(dit: Any, wrong: Any) -> None:
    with pytest.raises(SpecError, match="audit"):
        enable(dit, Every(), audit=wrong)


def test_a_report_names_a_folder_that_is_not_there(dit, tmp_path):
    with enable(dit, Every()) as session, pytest.raises(AccelerateHooksError, match="no folder"):
        session.report().save(tmp_path / "nowhere" / "r.json")


def test_visits_before_an_abort_are_written_down(dit: Any) -> None:
    """Bookkeeping waits for the end of a forward, which may be an exception."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("half-way")

    with enable(dit, Quiet()) as session:
        generate(dit, steps=3)
        blocks = [site for site in session.sites if site.kind == "block"]
        before = [session.record(site).computed for site in blocks]
        entries = len(session.trace)
        handle = dit.transformer_blocks[1].norm1.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="half-way"):
            generate(dit, steps=1)
        handle.remove()
        after = [session.record(site).computed for site in blocks]
        new = [(e.site, e.action) for e in list(session.trace)[entries:]]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1] + [0] * (len(blocks) - 1)
    assert new == [("transformer_blocks.0", "run")]
