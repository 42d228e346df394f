"""`evaluate` measures the same inputs with and without, and says how sure it is."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY

from accelerate_hooks import Policy, SpecError, UnsupportedModelError, active, evaluate
from accelerate_hooks import _metrics as metrics
from accelerate_hooks._ranking import NoisyMeasurementError
from accelerate_hooks.evaluate import Contestant


@dataclass(frozen=True, kw_only=True)
class Every(Policy):
    name: ClassVar[str] = "every"
    n: int = 2
    kind: str = "block"

    @property
    def kinds(self) -> Any:
        return (self.kind,)

    def around(self, call: Any) -> Any:
        return call.skip() if call.step.index % self.n else call.proceed()


@dataclass(frozen=True, kw_only=True)
class SecondHalf(Every):
    name: ClassVar[str] = "second_half"

    def around(self, call: Any) -> Any:
        return call.skip() if 2 * call.site.index >= call.site.count else call.proceed()


@pytest.fixture(scope="module")
def dit() -> Any:
    return TINY["dit"].build()


@pytest.fixture(scope="module")
def llama() -> Any:
    return TINY["llama"].build()


def loop(model: Any, steps: int = 4) -> Any:
    """A few steps from noise that the global generator draws, ``item`` added."""

    def run(item: float) -> torch.Tensor:
        inputs = TINY["dit"].inputs(2)
        x = torch.randn(2, 4, 8, 8) + item
        for time in torch.linspace(9, 1, steps):
            inputs.update(hidden_states=x, timestep=time.expand(2))
            x = x - model(**inputs)[0] / steps
        return x

    return run


def test_a_callable_with_a_target(dit: Any) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    table = evaluate(
        loop(dit),
        {
            "exact": Every(n=1),
            "every": Every(),
            "both": [Every(), Every(kind="attention")],
            "fewer": loop(dit, 2),
        },
        [0.0, 0.5, 1.0],
        target=dit,
    )
    assert active(dit) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [row.label for row in table.rows] == ["plain", "exact", "every", "both", "fewer"]
    for label in ("plain", "exact"):
        assert table[label].value == table[label].value_high == 0.0
        assert not table[label].visits_skipped
    assert table["plain"].speedup == 1.0
    assert table["every"].visits_skipped == 0.5
    assert 0.4 < (table["every"].flops_skipped or 0) < 0.5
    assert table["every"].samples == 6
    row = table["every"]
    assert 0 < row.value_low <= row.value <= row.value_high
    assert row.speedup_low <= row.speedup <= row.speedup_high
    assert table["fewer"].visits_skipped is None
    assert table["fewer"].value > 0
    assert "never skipped" in table["exact"].note
    assert "never skipped" not in table["every"].note
    mean, low, high = table.difference("every", "fewer")
    assert low <= mean <= high
    assert mean == pytest.approx(table["every"].value - table["fewer"].value)


def test_the_same_again(dit: Any) -> None:
    tables = [evaluate(loop(dit), [Every()], [0.0, 1.0], target=dit, repeats=1) for _ in range(2)]
    assert tables[0].values == tables[1].values
    for a, b in zip(tables[0].rows, tables[1].rows, strict=True):
        assert (a.value, a.value_low, a.value_high) == (b.value, b.value_low, b.value_high)
    assert evaluate(loop(dit), [Every()], [0.0, 1.0], target=dit, repeats=1, seed=1).values != (
        tables[0].values
    )


@pytest.mark.parametrize("metric", ["kl", "agreement", "drift", "psnr"])
def test_a_module(llama: Any, metric: Any) -> None:
    data = [dict(TINY["llama"].inputs(2), use_cache=False)]
    table = evaluate(llama, {"half": SecondHalf()}, data, metric=metric, repeats=2)
    best = {"kl": 0.0, "agreement": 1.0, "drift": 0.0, "psnr": math.inf}[metric]
    assert table["plain"].value == best
    assert table["half"].value != best
    assert table["half"].visits_skipped == 0.5
    assert table["half"].samples == 2
    assert not table["half"].note


def test_a_callable_of_one_forward(llama: Any) -> None:
    def run(item: dict[str, Any]) -> torch.Tensor:
        return llama(**item).logits

    data = [dict(TINY["llama"].inputs(2), use_cache=False)]
    table = evaluate(run, {"half": SecondHalf()}, data, target=llama, settle=True, repeats=1)
    assert table["half"].visits_skipped == 0.5


def test_a_reference_of_ones_own(dit: Any) -> None:
    table = evaluate(
        loop(dit), {"6": loop(dit, 6)}, [0.0], reference=loop(dit, 6), metric="psnr", repeats=1
    )
    assert table["6"].value == math.inf
    assert table["plain"].value < math.inf


def test_generators_in_the_data_start_from_the_same_state(dit: Any) -> None:
    generator = torch.Generator().manual_seed(3)

    def run(item: dict[str, Any]) -> torch.Tensor:
        return torch.randn(2, 3, generator=item["generator"][0])

    table = evaluate(run, {"again": run}, [{"generator": [generator]}])
    assert table["again"].value == 0.0


def test_setup_is_entered_and_left(dit: Any) -> None:
    events: list[str] = []

    @contextmanager
    def switch() -> Iterator[None]:
        events.append("on")
        yield
        events.append("off")

    evaluate(loop(dit), {"peer": Contestant(setup=switch)}, [0.0], repeats=2)
    assert events == ["on", "off"] * 3


class Pipe:
    """What a diffusers pipeline looks like."""

    components: ClassVar[dict[str, Any]] = {}
    scheduler = None

    def __init__(self, model: Any) -> None:
        self.transformer = model

    def __call__(self, *, item: float) -> Any:
        from PIL import Image

        x = loop(self.transformer)(item)[:, :3].permute(0, 2, 3, 1)
        arrays = (x.clamp(-1, 1) * 127 + 128).to(torch.uint8).numpy()

        class Output:
            images: ClassVar[Any] = [Image.fromarray(a) for a in arrays]

        return Output()


def test_a_pipeline_that_gives_pictures(dit: Any) -> None:
    pytest.importorskip("PIL")
    table = evaluate(Pipe(dit), [Every()], [{"item": 0.0}], metric="psnr", repeats=1)
    assert table["plain"].value == math.inf
    assert 0 < table["every"].value < 60
    assert table["every"].samples == 2
    assert table["every"].visits_skipped == 0.5
    assert "data range of 1" in str(table)


def test_the_text(dit: Any) -> None:
    named = {"a label that is far too long to be shown in full | and odd": Every(n=1)}
    table = evaluate(loop(dit), {**named, "every": Every()}, [0.0], target=dit, repeats=1)
    assert max(map(len, str(table).splitlines())) < 100
    lines = table.to_markdown().splitlines()
    bars = {line.replace("\\|", "").count("|") for line in lines[:5]}
    assert bars == {7}
    found = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert found["schema"] == 1
    assert [row["label"] for row in found["rows"]][2] == "every"
    assert evaluate(loop(dit), {"same": loop(dit)}, [0.0], metric="psnr").to_dict()["rows"][0][
        "value"
    ] == ("inf")


def test_a_noisy_machine_is_refused(dit: Any) -> None:
    table = evaluate(loop(dit), {"same": loop(dit)}, [0.0], repeats=1)
    replace(table, plain_iqr=0.1).check_quiet()
    with pytest.raises(NoisyMeasurementError, match=r"16\.0%"):
        replace(table, plain_iqr=0.16).check_quiet()
    replace(table, plain_iqr=0.16).check_quiet(limit=0.2)


def test_wrong_arguments(dit: Any) -> None:
    run = loop(dit)
    with pytest.raises(SpecError, match="metric='ssim'"):
        evaluate(run, [], [0.0], metric="ssim")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="at least one item"):
        evaluate(run, [], [])
    for wrong in ({"data": None}, {"data": {"x": 1}}, {"repeats": "x"}, {"seed": "x"}):
        with pytest.raises(SpecError, match="evaluate: "):
            evaluate(run, **{"policies": [], "data": [0.0]} | wrong)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="policies is a NoneType"):
        evaluate(run, None, [0.0])  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="keyword arguments"):
        evaluate(dit, [], [3])
    with pytest.raises(SpecError, match="'plain' is the label"):
        evaluate(run, {"plain": Every()}, [0.0])
    with pytest.raises(UnsupportedModelError, match="target="):
        evaluate(run, [Every()], [0.0])
    with pytest.raises(UnsupportedModelError, match=r"no nn\.Module"):
        evaluate(3, [Every()], [0.0])
    with pytest.raises(UnsupportedModelError, match="finds no tensor"):
        evaluate(lambda item: "text", {}, [0.0])
    with pytest.raises(UnsupportedModelError, match="cannot be compared"):
        evaluate(run, {"other": lambda item: torch.zeros(3)}, [0.0])
    with pytest.raises(SpecError, match="no row 'x'"):
        evaluate(run, {}, [0.0], repeats=1)["x"]
    dit.train()
    try:
        with pytest.raises(UnsupportedModelError, match="eval"):
            evaluate(dit, [Every()], [TINY["dit"].inputs(1)])
    finally:
        dit.eval()


# Metrics and intervals


@given(seed=st.integers(0, 100), rows=st.integers(1, 3), scale=st.floats(0, 2))
def test_metrics_are_their_formulas(seed: int, rows: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, 4, 5, generator=generator)
    b = a + scale * torch.randn(rows, 4, 5, generator=generator)
    for name in metrics.METRICS:
        found = metrics.compare(name, b, a, 2.0, True)
        assert len(found) == rows
        for i, value in enumerate(found):
            x, y = b[i].double(), a[i].double()
            mse = float(((x - y) ** 2).mean())
            p, q = y.softmax(-1), x.softmax(-1)
            wanted = {
                "drift": float((x - y).norm() / y.norm()),
                "psnr": 10 * math.log10(4.0 / mse) if mse else math.inf,
                "kl": float((p * (p / q).log()).sum(-1).mean()),
                "agreement": float((x.argmax(-1) == y.argmax(-1)).float().mean()),
            }[name]
            assert value == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        assert len(metrics.compare(name, b, a, 2.0, False)) == 1


def test_drift_from_nothing_and_masked_logits() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert metrics.compare("drift", zero, zero, 1.0, True) == [0.0]
    assert metrics.compare("drift", one, zero, 1.0, True) == [math.inf]
    masked = torch.tensor([[0.0, 1.0, -math.inf]])
    assert metrics.compare("kl", masked, masked, 1.0, True) == [0.0]


def test_intervals_hold_the_mean_and_shrink() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator).tolist()
    few, many = (metrics.interval(values[:n], 0) for n in (20, 400))
    assert many[0] < 0 < many[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert metrics.interval([3.0], 0) == (3.0, 3.0)
    assert metrics.interval([1.0, math.inf], 0) == (1.0, math.inf)


def test_paired_differences_are_surer_than_their_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (10 * torch.randn(50, generator=generator)).tolist()
    better = [value + 1 for value in base]
    mean, low, high = metrics.difference(better, base, 0)
    assert (mean, low, high) == pytest.approx((1.0, 1.0, 1.0))
    assert metrics.difference([math.inf], [math.inf], 0)[0] == 0.0


def test_the_spread_of_times() -> None:
    assert metrics.spread([[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]]) == 0.0
    assert metrics.spread([[1.0]]) == 0.0
    assert metrics.spread([[1.0, 1.0, 2.0, 2.0]]) > 0.3
    assert metrics.spread([[1.0], [1.0], [1.0], [2.0]]) > 0.1
