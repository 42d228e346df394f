"""Who may import whom (the table under Layout in the design), read from the source."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("accelerate_hooks", "kernels", "patches", "policies")
OURS = "accelerate_hooks"
PRIVATE = re.compile(r"\._[a-z]", re.IGNORECASE)
# Stems that name no policy and no family: the core may tell the libraries apart.
GENERAL = {"__init__", "diffusers", "structural", "transformers"}
OUTSIDE = ("tests", "benchmarks", f"{OURS}.cli", f"{OURS}.demo")


class Import(NamedTuple):
    module: str  # dotted: `from a import b` gives a.b
    inside: bool  # in a function, or for the type checker alone
    line: int


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module that lies in `package`."""

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(name.name, inside, child.lineno) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - child.level + 1]
                parts = (above if child.level else []) + ([child.module] if child.module else [])
                for name in child.names:
                    yield Import(".".join([*parts, name.name]), inside, child.lineno)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                if child.args and isinstance(child.args[0], ast.Constant):
                    yield Import(str(child.args[0].value), inside, child.lineno)
                yield from walk(child, inside)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, inside or function or typing)

    yield from walk(ast.parse(source), False)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def forbidden(path: Path, found: Import) -> str | None:
    """Why a file (its path from the root) may not import this, or None."""
    module, layer = found.module, path.parts[0]
    if layer == OURS and path.parts[1] in ("__main__.py", "cli", "demo"):
        return None
    if within(module, "kernels", "patches", "policies"):
        return f"the package is {OURS}.{module}; at top level the name is another's"
    if within(module, *OUTSIDE):
        return "nobody imports tests, benchmarks, cli or demo"
    library = within(module, "transformers", "diffusers")
    own = f"{OURS}.{path.stem}" if layer == OURS else f"{OURS}.{layer}.{path.stem}"
    private = within(module, OURS) and not within(module, own) and PRIVATE.search(module)
    if layer == "kernels":
        known = within(module, "torch", "triton", f"{OURS}.kernels")
        standard = module.split(".")[0] in sys.stdlib_module_names
        return None if known or standard else "kernels import torch and triton only"
    if layer == "policies":
        if library or within(module, f"{OURS}.patches"):
            return "policies never import patches, transformers or diffusers"
        if path.stem != "__init__" and within(module, f"{OURS}.policies"):
            helper = ".policies._" in module  # of one policy, kept beside it
            return None if helper or within(module, own) else "no policy imports another policy"
        return "policies use public names of the core and kernels only" if private else None
    if layer == "patches":
        if within(module, f"{OURS}.policies", f"{OURS}.kernels"):
            return "patches never import policies or kernels"
        if library and not found.inside:
            return "patches import transformers and diffusers inside functions only"
        return "patches use public names of the core and each other only" if private else None
    if library and not found.inside:
        return "the core imports no library at import time"
    if path.stem != "__init__" and any(within(module, part) for part in submodules()):
        return "the core names no policy, family or kernel"
    return None


def submodules() -> list[str]:
    """The modules of the other three layers, and all kernels."""
    outer = (path for path in sources() if path.parts[0] != OURS and path.stem != "__init__")
    return [
        f"{OURS}.kernels",
        *(f"{OURS}.{'.'.join(path.with_suffix('').parts)}" for path in outer),
    ]


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in found)


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_keep_to_the_layers(path: Path) -> None:
    inner = path.parent.parts if path.parts[0] == OURS else (OURS, *path.parent.parts)
    wrong = [
        f"{path}:{found.line}: {found.module}: {why}"
        for found in imports((ROOT / path).read_text(encoding="utf-8"), ".".join(inner))
        if (why := forbidden(path, found))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_names_no_policy_and_no_family() -> None:
    names = {
        path.stem
        for path in sources()
        if path.parts[0] in ("patches", "policies") and path.stem not in GENERAL
    }
    wrong = [
        f"{path} names {name}"
        for path in sources()
        if path.parts[0] == OURS and len(path.parts) == 2 and path.stem != "__init__"
        for name in sorted(names & words(ast.parse((ROOT / path).read_text(encoding="utf-8"))))
    ]
    assert not wrong, "\n".join(wrong)


def words(tree: ast.AST) -> set[str]:
    """Identifiers, and the words of strings that are no docstrings."""
    found: set[str] = set()
    prose = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            text = " ".join([getattr(node, "module", "") or "", *(n.name for n in node.names)])
            found.update(re.findall(r"\w+", text))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            found.update(re.findall(r"\w+", node.value))
    return found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/op.py", "from accelerate_hooks.call import Call"),
        ("kernels/op.py", "import transformers"),
        ("policies/a.py", "from accelerate_hooks.policies.b import B"),
        ("policies/a.py", "from .b import B"),
        ("policies/a.py", "from . import b"),
        ("policies/a.py", "def f():\n    import diffusers"),
        ("policies/a.py", "from accelerate_hooks import patches"),
        ("patches/a.py", "import diffusers"),
        ("patches/a.py", "from accelerate_hooks.policies import LazyStep"),
        ("patches/a.py", "from accelerate_hooks.patches.b import _private"),
        ("patches/a.py", "from accelerate_hooks._settings import checked"),
        ("patches/a.py", "import kernels"),
        ("kernels/op.py", "import numpy"),
        ("accelerate_hooks/core.py", "from accelerate_hooks.kernels import op"),
        ("accelerate_hooks/core.py", "from accelerate_hooks.demo import pipeline"),
        ("accelerate_hooks/core.py", "import importlib\nimportlib.import_module('tests.x')"),
        ("accelerate_hooks/core.py", "if True:\n    import transformers"),
    ],
)
def test_the_rules_catch(path: str, source: str) -> None:
    folder = Path(path).parts[0]
    package = folder if folder == OURS else f"{OURS}.{folder}"
    assert any(forbidden(Path(path), found) for found in imports(source, package))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "kernels/op.py",
            "import torch\nimport triton\nfrom accelerate_hooks.kernels import dispatch",
        ),
        ("policies/a.py", "from accelerate_hooks.policy import Policy\nfrom . import a"),
        ("policies/__init__.py", "from accelerate_hooks.policies.a import A"),
        ("patches/a.py", "def f():\n    import diffusers"),
        ("patches/a.py", "from accelerate_hooks.patches.a import _own"),
        ("accelerate_hooks/core.py", "def f():\n    from accelerate_hooks.patches import PATCHES"),
        ("patches/a.py", "if TYPE_CHECKING:\n    import diffusers"),
        ("patches/a.py", "from accelerate_hooks.patches.b import public"),
        ("accelerate_hooks/cli/main.py", "from accelerate_hooks.demo import run"),
    ],
)
def test_the_rules_allow(path: str, source: str) -> None:
    folder = Path(path).parts[0]
    package = folder if folder == OURS else f"{OURS}.{folder}"
    assert not any(forbidden(Path(path), found) for found in imports(source, package))
