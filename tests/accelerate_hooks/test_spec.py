"""The grammar of specs, recipes, and where policy classes come from."""

import json
import math
import sys
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate_hooks import registry as registry_module
from accelerate_hooks.artifact import Artifact
from accelerate_hooks.errors import AccelerateHooksError, ArtifactError, RecipeError, SpecError
from accelerate_hooks.policy import Policy
from accelerate_hooks.recipe import load_recipe, save_recipe
from accelerate_hooks.registry import PolicyRegistry, available_policies
from accelerate_hooks.spec import Addressed, parse, render


@dataclass(frozen=True, kw_only=True)
class Wide(Policy):
    """A field of every type that a policy may have."""

    name: ClassVar[str] = "wide"
    threshold: float = 0.1
    count: int = 3
    on: bool = False
    word: str = "hold"
    maybe: str | None = None
    limit: float | None = None
    mode: Literal["hold", "linear", "taylor"] = "hold"
    order: Literal[1, 2, 3] = 1
    steps: tuple[int, ...] = ()
    pairs: tuple[tuple[float, str], ...] = ()
    kinds_of: frozenset[str] = frozenset()
    table: tuple[str, ...] | None = field(default_factory=lambda: ("a",))
    mixed: float | Literal["auto"] = "auto"
    either: int | str = 1
    artifact: Artifact | None = None

    def __post_init__(self) -> None:
        self.require("count", self.count >= 0, "a count of 0 or more")


@dataclass(frozen=True, kw_only=True)
class Needy(Policy):
    name: ClassVar[str] = "needy"
    ratio: float


REGISTRY: dict[str, type[Policy]] = {"wide": Wide, "needy": Needy}

AWKWARD = [
    "",
    "'",
    "''",
    "+",
    "a+b",
    ",",
    "=",
    ":",
    "@",
    "null",
    "true",
    "1",
    "1e+16",
    "inf",
    "-inf",
]
AWKWARD += [
    "NaN",
    "x.json",
    "it's",
    "[1]",
    '"',
    "a b",
    " a",
    "\n",
    "é",
    "名前",
    "\u2028",
    "*.attn[0]",
]
texts = st.one_of(st.sampled_from(AWKWARD), st.text(max_size=12))
floats = st.one_of(
    st.sampled_from([0.0, -0.0, 1e16, 1e-300, 5e-324, math.inf, -math.inf]),
    st.floats(allow_nan=False),
)
wides = st.builds(
    Wide,
    threshold=floats,
    count=st.integers(min_value=0),
    on=st.booleans(),
    word=texts,
    maybe=st.none() | texts,
    limit=st.none() | floats,
    mode=st.sampled_from(["hold", "linear", "taylor"]),
    order=st.sampled_from([1, 2, 3]),
    steps=st.lists(st.integers(), max_size=3).map(tuple),
    pairs=st.lists(st.tuples(floats, texts), max_size=2).map(tuple),
    kinds_of=st.frozensets(texts, max_size=3),
    table=st.none() | st.lists(texts, max_size=2).map(tuple),
    mixed=floats | st.just("auto"),
    either=st.integers() | texts,
)
policies = wides | st.builds(Needy, ratio=floats)
addressed = st.builds(Addressed, policies, st.none() | texts)


@given(st.lists(addressed, min_size=1, max_size=3))
def test_a_spec_says_all_of_a_policy(entries: list[Addressed]) -> None:
    spec = "+".join(render(entry.policy, entry.only) for entry in entries)
    assert parse(spec, REGISTRY) == entries


@given(policies)
def test_str_is_the_spec(policy: Policy) -> None:
    assert parse(str(policy), REGISTRY) == [Addressed(policy)]


@given(
    entries=st.lists(addressed, min_size=1, max_size=3), suffix=st.sampled_from(["json", "yaml"])
)
def test_a_recipe_says_all_of_a_policy(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Addressed], suffix: str
) -> None:
    if suffix == "yaml":
        pytest.importorskip("yaml")
    path = tmp_path_factory.mktemp("recipe") / f"recipe.{suffix}"
    save_recipe(path, entries)
    assert load_recipe(path, REGISTRY) == entries
    assert parse(str(path), REGISTRY) == entries


@pytest.mark.parametrize("spec", [None, 5, b"lazy_step"])
def test_a_spec_is_a_string(spec: Any) -> None:
    with pytest.raises(SpecError, match="a spec is a string"):
        parse(spec)


@given(st.text(alphabet="wide:,+@='[]{}\"0.1e x\n", max_size=30) | st.text(max_size=20))
def test_any_text_parses_or_is_an_error_of_ours(text: str) -> None:
    try:
        found = parse(text, REGISTRY)
    except AccelerateHooksError as error:
        assert str(error)
    else:
        assert parse("+".join(render(e.policy, e.only) for e in found), REGISTRY) == found


@pytest.mark.parametrize(
    ("spec", "settings", "only"),
    [
        ("wide", {}, None),
        (" wide : count = 4 , on = true ", {"count": 4, "on": True}, None),
        ("wide@blocks.*:threshold=1", {"threshold": 1.0}, "blocks.*"),
        ("wide@'a:b+c':word='a+b,c=d'", {"word": "a+b,c=d"}, "a:b+c"),
        ("wide:threshold=1e16", {"threshold": 1e16}, None),
        ("wide:threshold='1e+16'", {"threshold": 1e16}, None),
        ("wide:threshold=inf,limit=null", {"threshold": math.inf}, None),
        ("wide:word='it''s'", {"word": "it's"}, None),
        ('wide:word="a\\u00e9"', {"word": "aé"}, None),
        ("wide:steps=[1, 2],mixed=0.5", {"steps": (1, 2), "mixed": 0.5}, None),
        ("wide:either='1'", {"either": "1"}, None),
    ],
)
def test_forms(spec: str, settings: dict[str, Any], only: str | None) -> None:
    assert parse(spec, REGISTRY) == [Addressed(Wide(**settings), only)]


def test_only_what_differs_is_written() -> None:
    assert str(Wide()) == "wide"
    assert str(Wide(threshold=0.5, word="a+b", on=True)) == "wide:threshold=0.5,on=true,word='a+b'"
    assert render(Wide(threshold=1e16), "blocks.*") == "wide@blocks.*:threshold=1e16"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "a policy's name is expected (at position 0"),
        ("wide+", "a policy's name is expected (at position 5"),
        (
            "needy:ratio=1+wied",
            "no policy 'wied'; did you mean 'wide'? (known: wide, needy) (at pos",
        ),
        ("wide:treshold=1", "wide has no field 'treshold'; did you mean 'threshold'?"),
        ("wide:name=x", "wide has no field 'name'"),
        ("wide:count=x", "wide.count takes int, got 'x' (at position 5 of"),
        ("wide:count=true", "wide.count takes int, got True"),
        ("wide:count=1.5", "wide.count takes int, got 1.5"),
        ("wide:threshold=nan", "wide.threshold takes float, got 'nan'"),
        ("wide:threshold=NaN", "wide.threshold takes float"),
        ("wide:word=1", "wide.word takes str, got 1; write '1'"),
        ("wide:mode=liner", """takes "hold" or "linear" or "taylor", got 'liner'; did you mean"""),
        ("wide:limit=[1]", "wide.limit takes float or null"),
        ("wide:threshold=1e+16", "write 1e16 or '1e+16'"),
        ("wide:count=-1", "count=-1 is out of range"),
        ("wide:count=1,count=2", "'count' is given twice (at position 13"),
        ("wide:count", "'count' needs a value"),
        ("wide:word=", "a value is expected"),
        ("wide:word='a", "this quote is never closed (at position 10"),
        ("wide:steps=[1", "not JSON"),
        ("wide:word=a b", "'b' is not expected"),
        ("wide@", "a glob is expected"),
        ("wide:", "a field of wide is expected"),
        ("needy", "ratio"),
    ],
)
def test_errors_name_piece_place_and_fix(spec: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(spec, REGISTRY)
    assert said in str(caught.value)


def test_artifacts_travel_as_paths(tmp_path: Path) -> None:
    meta = {"policy": "wide", "model": "M", "config_hash": "0"}
    policy = Wide(artifact=Artifact({"gate": torch.ones(2)}, meta))
    with pytest.raises(ArtifactError, match="never saved"):
        parse(str(policy), REGISTRY)
    with pytest.raises(RecipeError, match="never saved"):
        save_recipe(tmp_path / "r.json", [Addressed(policy)])
    assert policy.artifact is not None
    (tmp_path / "made").mkdir()
    policy.artifact.save(tmp_path / "made" / "it's a+b.safetensors")
    assert parse(str(policy), REGISTRY) == [Addressed(policy)]

    save_recipe(tmp_path / "r.json", [Addressed(policy, "*")])
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["policies"][0]["settings"]["artifact"] == "made/it's a+b.safetensors"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_recipe(moved / "r.json", REGISTRY) == [Addressed(policy, "*")]
    (moved / "made" / "it's a+b.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no such artifact"):
        load_recipe(moved / "r.json", REGISTRY)


def listing(policies: str) -> str:
    return f'{{"accelerate_hooks": 1, "policies": [{policies}]}}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "has to be an object"),
        ("{}", "lacks accelerate_hooks, policies"),
        ('{"accelerate_hooks": 2, "policies": [{}]}', "version 2, this release reads 1"),
        ('{"accelerate_hooks": true, "policies": [{}]}', "version True"),
        ('{"accelerate_hooks": 1, "polices": []}', "'polices'; did you mean 'policies'?"),
        ('{"accelerate_hooks": 1, "policies": []}', "at least one policy"),
        ('{"accelerate_hooks": 1, "accelerate_hooks": 1}', "given twice"),
        (listing("3"), "policies[0]: has to be an object"),
        (listing('{"only": null}'), "policies[0]: lacks policy"),
        (listing('{"policy": 3}'), "policies[0].policy: has to be"),
        (
            listing('{"policy": "wied"}'),
            "policies[0].policy: there is no policy 'wied'; did you mean 'wide'?",
        ),
        (listing('{"policy": "wide", "only": 3}'), "policies[0].only: has to be a glob or null"),
        (listing('{"policy": "wide", "setings": {}}'), "did you mean 'settings'?"),
        (listing('{"policy": "wide", "settings": []}'), "policies[0].settings: has to be"),
        (
            listing('{"policy": "wide"}, {"policy": "wide", "settings": {"x": 1}}'),
            "policies[1].settings.x:",
        ),
        (
            listing('{"policy": "wide", "settings": {"count": "x"}}'),
            "settings.count: wide.count takes int",
        ),
        (listing('{"policy": "wide", "settings": {"count": -1}}'), "out of range"),
    ],
)
def test_recipe_errors_name_file_and_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, REGISTRY)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("only", [None, "blocks.*", "a'b c"])
def test_what_was_parsed_is_a_spec_again(only: str | None) -> None:
    addressed = Addressed(Wide(), only)
    assert parse(str(addressed), REGISTRY) == [addressed]


def test_a_recipe_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="surrogates"):
        save_recipe(tmp_path / "r.json", [Addressed(Wide(word="\ud800"))])
    assert not list(tmp_path.iterdir())


def test_recipe_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        parse(str(tmp_path / "none.json"), REGISTRY)
    with pytest.raises(RecipeError, match=r"ends in \.json"):
        save_recipe(tmp_path / "r.txt", [])
    for wrong in (None, 3):
        with pytest.raises(RecipeError, match="to a path"):
            save_recipe(wrong, [])  # type: ignore[arg-type]
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RecipeError, match="not JSON"):
        load_recipe(tmp_path / "deep.json", REGISTRY)
    with pytest.raises(RecipeError, match="cannot be written"):
        save_recipe(tmp_path / "no" / "folder.json", [])
    (tmp_path / "r.yaml").write_text("a: [")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(RecipeError, match="pip install pyyaml"):
        load_recipe(tmp_path / "r.yaml", REGISTRY)


def test_recipes_in_yaml(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "r.yml"
    path.write_text(
        "accelerate_hooks: 1\npolicies:\n- {policy: wide, settings: {threshold: 1e16}}\n"
    )
    assert load_recipe(path, REGISTRY) == [Addressed(Wide(threshold=1e16))]
    path.write_text("a: [")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path, REGISTRY)


def offer(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    offered = [EntryPoint(name, value, registry_module.GROUP) for name, value in points]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: offered)


def test_policies_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"good": Wide, "wrong": Wide}
    monkeypatch.setitem(sys.modules, "plug_in", type("M", (), there))
    monkeypatch.setattr(Wide, "name", "good")
    offer(
        monkeypatch,
        ("good", "plug_in:good"),
        ("wrong", "plug_in:wrong"),
        ("broken", "no_such_module:Policy"),
        ("twice", "plug_in:good"),
        ("twice", "plug_in:wrong"),
    )
    assert available_policies()["good"] is Wide
    assert {"wrong", "broken", "twice"}.isdisjoint(available_policies())
    assert {"wrong", "broken", "twice"} <= set(PolicyRegistry())
    assert parse("good:count=1") == [Addressed(Wide(count=1))]
    for name, said in [
        ("broken", "broken = no_such_module:Policy' of an unnamed distribution raised ModuleNot"),
        ("wrong", "is not a policy of that name"),
        ("twice", "uninstall all but one"),
    ]:
        with pytest.raises(SpecError, match=name) as caught:
            parse(name)
        assert said in str(caught.value)


def test_built_in_policies_win(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate_hooks.policies as built_in

    monkeypatch.setattr(built_in, "__all__", ["Wide"], raising=False)
    monkeypatch.setattr(built_in, "Wide", Wide, raising=False)
    offer(monkeypatch, ("wide", "no_such_module:Policy"))
    assert available_policies() == {"wide": Wide}
