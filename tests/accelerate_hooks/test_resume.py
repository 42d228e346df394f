"""The file in which a fit keeps what it measured."""

import numpy
import pytest
import torch
from torch import nn

from accelerate_hooks import ArtifactError
from accelerate_hooks.resume import Resume


def model(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Linear(width, 8)


def items(*seeds):
    return [
        {"x": torch.randn(3, generator=torch.Generator().manual_seed(s)), "prompt": "a", "steps": 4,
         "generator": torch.Generator().manual_seed(s), "image": numpy.full(3, s)}
        for s in seeds
    ]  # fmt: skip


def test_it_goes_on_where_it_was(tmp_path):
    given = {"model": model(), "policy": "p"}
    kept = Resume(tmp_path / "fit", data=items(0, 1), **given)
    assert kept.load() is None
    state = {"a": torch.arange(3), (1, "x"): [1.5, None]}
    kept.save(state, 1)
    for data in (items(0, 1), items(0), items(0, 7, 8)):  # those it has seen are the same
        again = Resume(tmp_path / "fit", data=data, **given).load()
        assert again.keys() == state.keys() and torch.equal(again["a"], state["a"])
    assert Resume(None, data=items(0), **given).load() is None
    Resume(None, data=items(0), **given).save(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "q"}, "policy=p"),
        ({"model": model(1)}, "weights="),
        ({"model": model(0, 9)}, "config_hash="),
        ({"data": items(1, 1)}, "other data"),
        ({"data": items(0)}, "other data"),
        ({"data": [items(0)[0] | {"prompt": "b"}, *items(1)]}, "other data"),
        ({"data": [items(0)[0] | {"image": numpy.full(3, 5)}, *items(1)]}, "other data"),
        ({"data": [items(0)[0] | {"generator": items(5)[0]["generator"]}, *items(1)]}, "other"),
    ],
)
def test_what_was_begun_with_something_else_is_refused(tmp_path, change, words):
    given = {"model": model(), "policy": "p", "data": items(0, 1)}
    Resume(tmp_path / "fit", **given).save([1])
    with pytest.raises(ArtifactError, match=words):
        Resume(tmp_path / "fit", **(given | change)).load()


def test_bad_files_and_folders_are_told(tmp_path):
    given = {"model": model(), "data": []}
    with pytest.raises(ArtifactError, match="no folder"):
        Resume(tmp_path / "none" / "fit", **given)
    kept = Resume(tmp_path / "fit", **given)
    kept.save([1])
    whole = kept.path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        kept.path.write_bytes(content)
        with pytest.raises(ArtifactError, match="not a readable"):
            kept.load()
    torch.save({"state": 1}, kept.path)
    with pytest.raises(ArtifactError, match="not a readable"):
        kept.load()
    assert [p.name for p in tmp_path.iterdir()] == ["fit"]
