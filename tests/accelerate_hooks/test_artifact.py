"""Artifacts: equal by content, whole or refused, checked against what is at hand."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from accelerate_hooks.artifact import Artifact, config_hash
from accelerate_hooks.errors import ArtifactError
from accelerate_hooks.policy import Policy

META: dict[str, Any] = {
    "policy": "lazy_step",
    "model": "Linear",
    "config_hash": "0" * 64,
    "steps": 20,
    "resolution": (16, 16),
    "guidance": 2.0,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(
        0, 2, shape, generator=torch.Generator().manual_seed(seed)
    ).to(dtype),
    shapes,
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
values = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
metas = st.dictionaries(st.text(max_size=5), values | st.text(max_size=5) | st.lists(values))


@dataclass(frozen=True, kw_only=True)
class Fitted(Policy):
    name: ClassVar[str] = "fitted"
    artifact: Artifact | None = None


@given(held=st.dictionaries(st.text(max_size=4), tensors, max_size=3), more=metas)
def test_a_saved_artifact_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, held: dict[str, torch.Tensor], more: dict[str, Any]
) -> None:
    made = Artifact(held, more | META)
    path = tmp_path_factory.mktemp("made") / "gates.safetensors"
    made.save(path)
    assert list(path.parent.iterdir()) == [path]
    loaded = Artifact.load(path)
    assert loaded == made
    assert hash(loaded) == hash(made)
    assert dict(loaded.meta) == dict(made.meta)
    assert loaded.path == made.path == path
    for name, tensor in held.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_it_is_its_content() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    made = Artifact({"a": weight.T, "b": weight}, META)
    before = made.digest
    assert made == Artifact({"b": weight, "a": weight.T.contiguous()}, dict(reversed(META.items())))
    assert made != Artifact({"a": weight.T, "b": weight + 1}, META)
    assert made != Artifact({"a": weight.T, "b": weight}, META | {"steps": 21})
    weight.zero_()
    assert Artifact(made.tensors, made.meta).digest == before
    assert made != "something else"


def test_nobody_changes_one() -> None:
    made = Artifact({"a": nn.Parameter(torch.ones(2))}, META)
    assert not made.tensors["a"].requires_grad
    with pytest.raises(TypeError):
        made.meta["steps"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        made.tensors["a"] = torch.ones(1)  # type: ignore[index]
    with pytest.raises(AttributeError):
        made.meta = {}  # type: ignore[misc]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_policy_that_holds_one(clone: Callable[[Any], Any], tmp_path: Path) -> None:
    policy = Fitted(artifact=Artifact({"a": torch.ones(2)}, META))
    assert policy.artifact is not None
    policy.artifact.save(tmp_path / "a.safetensors")
    assert clone(policy) == policy
    assert len({policy, clone(policy), replace(policy, artifact=None)}) == 2
    assert clone(policy).artifact.path == policy.artifact.path


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({}, "lacks policy, model, config_hash"),
        (META | {"model": None}, "lacks model"),
        (META | {"data": object()}, "has to be JSON"),
        (META | {"data": float("nan")}, "has to be JSON"),
    ],
)
def test_meta_is_checked(meta: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        Artifact({}, meta)


def damaged(path: Path, header: dict[str, str] | None) -> None:
    save_file({"a": torch.ones(2)}, path, header)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: None, "no such artifact"),
        (lambda path: path.mkdir(), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"\xff" * 64), "truncated"),
        (lambda path: damaged(path, None), "no artifact of accelerate_hooks"),
        (lambda path: damaged(path, {"format": "pt"}), "no artifact of accelerate_hooks"),
        (
            lambda path: damaged(path, head(version="2")),
            "format version '2', this release reads '1'",
        ),
        (lambda path: damaged(path, head()), "damaged metadata"),
        (lambda path: damaged(path, head(meta="{")), "damaged metadata"),
        (lambda path: damaged(path, head(meta="[1]")), "damaged metadata"),
        (lambda path: damaged(path, head(meta="{}")), "lacks policy, model, config_hash"),
    ],
)
def test_files_that_are_none(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "gates.safetensors"
    damage(path)
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def head(**more: str) -> dict[str, str]:
    return {"format": "accelerate_hooks.artifact", "version": "1"} | more


def test_a_truncated_file_at_every_length(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    Artifact({"a": torch.ones(3)}, META).save(whole)
    content = whole.read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="truncated"):
            Artifact.load(tmp_path / "cut")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    made = Artifact({}, META)
    with pytest.raises(ArtifactError, match="cannot be written"):
        made.save(tmp_path / "no" / "folder.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="cannot be written"):
        made.save(tmp_path / "taken")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
    assert made.path is None


def test_check_names_field_expected_and_got() -> None:
    model = nn.Linear(2, 2)
    made = Artifact.create({}, policy="lazy_step", model=model, steps=20, resolution=(16, 16))
    assert set(made.meta["versions"]) >= {"torch"}
    made.check()
    made.check(policy="lazy_step", model=model, steps=20, resolution=(16, 16), guidance=3.0)
    for at_hand, expected, got in [
        ({"policy": "early_exit"}, "policy='lazy_step'", "policy='early_exit'"),
        ({"model": nn.Conv1d(1, 1, 1)}, "model='Linear'", "model='Conv1d'"),
        ({"model": nn.Linear(2, 3)}, "config_hash=", "got config_hash="),
        ({"steps": 21}, "steps=20", "steps=21"),
        ({"resolution": (16, 8)}, "resolution=[16, 16]", "resolution=[16, 8]"),
    ]:
        with pytest.raises(ArtifactError) as caught:
            made.check(**at_hand)
        assert expected in str(caught.value)
        assert got in str(caught.value)


def test_config_hash_of_any_module() -> None:
    assert config_hash(nn.Linear(2, 2)) == config_hash(nn.Linear(2, 2).half())
    assert config_hash(nn.Linear(2, 2)) != config_hash(nn.Linear(2, 3))
    assert config_hash(nn.Linear(2, 2)) == config_hash(
        torch.compile(nn.Linear(2, 2), backend="eager")
    )
    assert len(config_hash(nn.ReLU())) == 64


def test_config_hash_survives_saving_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=11)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    deeper = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes))
    assert config_hash(model) == config_hash(again) != config_hash(deeper)
    assert config_hash(model) != config_hash(model.model)
    json.dumps(Artifact.create({}, policy="p", model=model).meta["versions"])


def test_config_hash_survives_saving_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(num_attention_heads=2, attention_head_dim=4, in_channels=2, norm_num_groups=1)
    model = diffusers.DiTTransformer2DModel(num_layers=1, sample_size=4, **sizes)
    model.save_pretrained(tmp_path)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    deeper = diffusers.DiTTransformer2DModel(num_layers=2, sample_size=4, **sizes)
    assert config_hash(model) == config_hash(again) != config_hash(deeper)
