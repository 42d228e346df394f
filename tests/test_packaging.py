"""What is installed is what lies in the repository, and importing it is harmless."""

import importlib.util
import os
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("kernels", "patches", "policies")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages() -> set[str]:
    """The folders with Python in them, as packages."""
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("accelerate_hooks", *MAPPED)
        for path in (ROOT / top).rglob("*.py")
    }
    dotted = (".".join(folder.parts) for folder in folders)
    return {
        name if name.startswith("accelerate_hooks") else f"accelerate_hooks.{name}"
        for name in dotted
    }


def run(code: str, cwd: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_folder_of_python_is_listed() -> None:
    """A new subpackage needs a line under packages in pyproject.toml, or a wheel lacks it."""
    assert set(project()["tool"]["setuptools"]["packages"]) == packages()


def test_no_tests_folder_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_folder_of_ours_hides_a_package() -> None:
    """Run with PYTHONSAFEPATH=1, as the Makefile does, or our kernels/ hides Hugging Face's."""
    for name in MAPPED:
        found = importlib.util.find_spec(name)
        where = [] if found is None else list(found.submodule_search_locations or [])
        assert not any(Path(folder).is_relative_to(ROOT) for folder in where), where


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("here", ["root", "elsewhere"])
def test_the_mapped_packages_resolve_anywhere(name: str, here: str, tmp_path: Path) -> None:
    code = f"import accelerate_hooks.{name} as it; print(it.__name__)"
    assert run(code, ROOT if here == "root" else tmp_path) == f"accelerate_hooks.{name}"


def test_importing_brings_no_library(tmp_path: Path) -> None:
    code = """
import sys, accelerate_hooks
from accelerate_hooks import spec, recipe, artifact, registry, errors
print(sorted({"transformers", "diffusers", "matplotlib", "yaml", "sklearn"} & set(sys.modules)))
"""
    assert run(code, tmp_path, "-W", "error") == "[]"


def test_the_makefile_and_ci() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in ("TORCH ?= torch==", "VENV ?= .venv", "export PYTHONSAFEPATH = 1"):
        assert line in makefile
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text(encoding="utf-8")
    assert script.stat().st_mode & stat.S_IXUSR


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_weights(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for top in ("accelerate_hooks", *MAPPED):
        prefix = "" if top == "accelerate_hooks" else "accelerate_hooks/"
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".c", ".safetensors", ".typed"):
                assert prefix + path.relative_to(ROOT).as_posix() in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
