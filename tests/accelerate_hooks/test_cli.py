"""The command line."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_models import TINY

from accelerate_hooks import __version__, available_policies
from accelerate_hooks.cli import COMMANDS, main

Captured = pytest.CaptureFixture[str]


def inspect(capsys: Captured, *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: Captured, *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    return err


def test_inspect_lists_policies_and_versions(capsys: Captured) -> None:
    text = inspect(capsys)
    for name, policy in available_policies().items():
        assert f"{name}: " in text
        for field in fields(policy):
            assert f"{field.name}=" in text
    assert "torch" in text
    assert __version__ in text
    assert max(map(len, text.splitlines())) < 100


def test_inspect_a_diffusers_class_on_the_meta_device(capsys: Captured) -> None:
    text = inspect(capsys, "FluxTransformer2DModel")
    assert "11,891.2 M parameters" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["19", "block", "transformer_blocks.*", "FluxTransformerBlock"] in [x[:4] for x in lines]
    assert ["38", "attention", "single_transformer_blocks.*.attn"] in [x[:3] for x in lines]


def test_inspect_a_transformers_class(capsys: Captured) -> None:
    text = inspect(capsys, "LlamaForCausalLM")
    assert "model.layers.*.self_attn" in text
    assert text.count("\n") < 15


def test_inspect_each_site(capsys: Captured) -> None:
    assert "transformer_blocks.27.attn1" in inspect(capsys, "DiTTransformer2DModel", "--sites")


def test_inspect_a_policy(capsys: Captured) -> None:
    text = inspect(capsys, "DiTTransformer2DModel", "--policy", "lazy_step:scope=site")
    acting = [line for line in text.splitlines() if "lazy_step:scope=site" in line]
    assert [line.split()[1] for line in acting] == ["attention", "mlp"]
    assert "no policy 'lazy_stop'" in refused(
        capsys, "DiTTransformer2DModel", "--policy", "lazy_stop"
    )


@pytest.mark.parametrize("name", ["dit", "llama"])
def test_inspect_a_folder(capsys: Captured, tmp_path: Path, name: str) -> None:
    model = TINY[name].build()
    if name == "dit":
        model.save_config(tmp_path)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path)
    folder = inspect(capsys, str(tmp_path))
    assert folder == inspect(capsys, str(tmp_path / "config.json"))
    assert type(model).__name__ in folder
    assert "transformer_blocks.*" in folder or "model.layers.*" in folder


def test_inspect_a_pipeline_s_folder(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    TINY["flux"].build().save_config(tmp_path / "transformer")
    text = inspect(capsys, str(tmp_path))
    assert "transformer: FluxTransformer2DModel" in text


@pytest.mark.parametrize("name", ["AutoencoderKL", "LlamaForCausalLM"])
def test_inspect_shows_what_enable_refuses(capsys: Captured, name: str) -> None:
    said = inspect(capsys, name)
    assert "lazy_step is refused" in said and "takes no timestep" in said
    assert not [line for line in said.splitlines() if line.endswith("  lazy_step")]


def test_inspect_says_what_is_wrong(capsys: Captured, tmp_path: Path) -> None:
    assert "did you mean FluxTransformer2DModel" in refused(capsys, "FluxTransformer2DModl")
    assert "no config.json" in refused(capsys, str(tmp_path))
    assert "no local folder" in refused(capsys, "some/model")
    assert "is no model class" in refused(capsys, "FluxPipeline")
    config = tmp_path / "config.json"
    config.write_text("{")
    assert "is not JSON" in refused(capsys, str(tmp_path))
    for text in ("{}", "[]"):
        config.write_text(text)
        assert "names no model class" in refused(capsys, str(tmp_path))
    config.write_text(json.dumps({"_class_name": "DiTTransformer2DModel", "in_channels": "x"}))
    assert "cannot be built" in refused(capsys, str(tmp_path))


def test_the_demo_asks_for_what_it_can_do_before_it_starts(
    capsys: Captured, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--threads", "-3"], "--threads must be at least 1"),
        (["--out", str(tmp_path / "file")], "is no folder"),
    ):
        assert main(["demo", *arguments]) == 1
        assert words in capsys.readouterr().err


def test_a_wrong_command_line(capsys: Captured) -> None:
    for arguments in ([], ["nothing"], ["inspect", "--wrong"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accelerate_hooks", "inspect"],
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lazy_step" in done.stdout
    assert not done.stderr


def test_a_reader_that_has_seen_enough() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate_hooks", "inspect"],
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert not said
