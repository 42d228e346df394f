"""List the sites of a model, and the policies that there are."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import textwrap
import warnings
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accelerate_hooks import available_policies
from accelerate_hooks._survey import versions
from accelerate_hooks._table import shortened
from accelerate_hooks.enable import enable
from accelerate_hooks.errors import AccelerateHooksError, ArtifactError, UnsupportedModelError
from accelerate_hooks.policy import Policy
from accelerate_hooks.registry import patch_for
from accelerate_hooks.site import Site
from accelerate_hooks.spec import parse

LIBRARIES = ("diffusers", "transformers")
_WIDTH = 99


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        nargs="?",
        help="a local folder with a config.json or model_index.json, or a class of transformers or "
        "diffusers (LlamaForCausalLM); nothing for the list of policies",
    )
    parser.add_argument("--policy", help="a spec: show where this policy acts instead of all")
    parser.add_argument("--sites", action="store_true", help="a line a site, not a stack")


def run(options: argparse.Namespace) -> int:
    if options.target is None:
        print("\n".join(policy_list()))
        return 0
    for name, model in models_of(options.target).items():
        print("\n".join(site_list(name, model, options.policy, options.sites)))
    return 0


# -- policies ------------------------------------------------------------------------------------


def policy_list() -> list[str]:
    lines = ["installed"]
    found = versions()
    lines += [f"  {name:<18}{found.get(name, 'not installed')}" for name in _packages(found)]
    lines += ["", "policies (give one to enable() as its name, or as name:field=value,...)"]
    for name, policy in available_policies().items():
        first = (policy.__doc__ or "").strip().partition("\n")[0]
        lines += textwrap.wrap(f"{name}: {first}", _WIDTH, initial_indent="  ")
        settings = ", ".join(f"{f.name}={_default(f)}" for f in fields(policy) if f.init)
        lines += textwrap.wrap(
            settings, _WIDTH, initial_indent="      ", subsequent_indent="      "
        )
    return lines


def _packages(found: dict[str, str]) -> list[str]:
    return [*found, *(name for name in LIBRARIES if name not in found)]


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return json.dumps(field.default, default=str)
    if field.default_factory is not MISSING:
        return json.dumps(field.default_factory(), default=str)
    return "(required)"


# -- models --------------------------------------------------------------------------------------


def models_of(target: str) -> dict[str, nn.Module]:
    """The models of a folder or class, by name, on the meta device: no weights, no memory."""
    path = Path(target)
    if path.is_dir() or path.name == "config.json":
        folder = path if path.is_dir() else path.parent
        return _of_folder(folder)
    if any(mark in target for mark in "/\\.") or path.exists():
        raise UnsupportedModelError(
            f"{target!r} is no local folder with a config.json; download the model's "
            "configuration first, or give the name of its class"
        )
    cls = _class(target)
    return {target: _built(target, lambda: _from_defaults(cls))}


def _of_folder(folder: Path) -> dict[str, nn.Module]:
    index = folder / "model_index.json"
    if index.is_file():
        from accelerate_hooks.patches.diffusers import DENOISERS

        parts = [name for name in DENOISERS if (folder / name / "config.json").is_file()]
        if parts:
            return {name: next(iter(_of_folder(folder / name).values())) for name in parts}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModelError(
            f"{folder}: there is no config.json (nor a model_index.json with a denoiser) in it; "
            "give the folder that save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise UnsupportedModelError(f"{folder / 'config.json'} is not JSON: {error}") from None
    found = config if isinstance(config, dict) else {}
    names = found.get("architectures") or [None]
    name = found.get("_class_name") or names[0]
    if not isinstance(name, str):
        raise UnsupportedModelError(
            f"{folder / 'config.json'} names no model class (_class_name or architectures); give "
            "the class instead, as in `accelerate-hooks inspect LlamaForCausalLM`"
        )
    cls = _class(name)
    if "_class_name" in config:
        return {name: _built(name, lambda: cls.from_config(config))}
    return {name: _built(name, lambda: cls(cls.config_class.from_pretrained(str(folder))))}


def _class(name: str) -> Any:
    """A model class of the installed libraries by its name."""
    known: list[str] = []
    for library in LIBRARIES:
        try:
            module = importlib.import_module(library)
        except ModuleNotFoundError:
            continue
        if name in dir(module):
            cls = getattr(module, name)
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                return cls
            raise UnsupportedModelError(
                f"{library}.{name} is no model class, or what it needs is not installed"
            )
        known += dir(module)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UnsupportedModelError(
        f"there is no model class or folder {name!r}{hint} (looked in {' and '.join(LIBRARIES)}; "
        "pip install 'accelerate-hooks[transformers,diffusers]' for both)"
    )


def _from_defaults(cls: Any) -> nn.Module:
    config = getattr(cls, "config_class", None)
    return cls() if config is None else cls(config())


def _built(name: str, make: Any) -> nn.Module:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make().eval()
    except AccelerateHooksError:
        raise
    except Exception as error:  # a constructor of somebody else's class may raise anything
        raise UnsupportedModelError(
            f"{name} cannot be built on the meta device from this configuration: "
            f"{type(error).__name__}: {error}"
        ) from error


# -- sites ---------------------------------------------------------------------------------------


def site_list(name: str, model: nn.Module, spec: str | None, each: bool) -> list[str]:
    patch = patch_for(model)
    sites = patch.sites(model)
    policies = _policies(spec)
    size = sum(p.numel() for p in model.parameters())
    cls = type(model).__name__
    head = cls if name == cls else f"{name}: {cls}"
    lines = [f"{head}, {size / 1e6:,.1f} M parameters, {len(sites)} sites"]
    for why in dict.fromkeys(filter(None, map(patch.refuses, sites))):
        lines += textwrap.wrap(f"blocks are not skipped: {why}", _WIDTH, initial_indent="  ")
    for policy, why in _refused(model, policies).items():
        del policies[policy]
        lines += textwrap.wrap(f"{policy} is refused: {why}", _WIDTH, initial_indent="  ")
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        where = (
            site.name
            if each
            else ".".join("*" if part.isdigit() else part for part in site.path.split("."))
        )
        groups.setdefault((where or site.name, site.kind), []).append(site)
    rows = [["sites", "kind", "where", "class", "policies"]]
    for (where, kind), group in groups.items():
        act = [n for n, p in policies.items() if any(_acts(p, site) for site in group)]
        classes = "/".join(dict.fromkeys(type(site.module).__name__ for site in group))
        rows.append([str(len(group)), kind, where, shortened(classes, 26), ", ".join(act) or "-"])
    if len(sites) <= 1:
        lines.append("  no stack of blocks was found: only policies on the whole model can act")
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [row[0].rjust(widths[0])]
        cells += [cell.ljust(width) for cell, width in zip(row[1:4], widths[1:], strict=True)]
        lines.append("  ".join(["", *cells, row[4]]))
    lines.append("")
    if spec is None:
        lines.append("policies: those that act under default settings; --policy SPEC shows others")
    lines.append('where: as only= of enable() takes it, in quotes: only="..."')
    return lines


def _refused(model: nn.Module, policies: dict[str, Policy]) -> dict[str, str]:
    """Policies that `enable` does not let act on this model, and why."""
    found: dict[str, str] = {}
    for name, policy in policies.items():
        try:
            enable(model, policy).disable()
        except (UnsupportedModelError, ArtifactError) as error:
            found[name] = str(error)
    return found


def _policies(spec: str | None) -> dict[str, Policy]:
    if spec is not None:
        return {str(a.policy): a.policy for a in parse(spec)}
    found: dict[str, Policy] = {}
    for name, cls in available_policies().items():
        try:
            found[name] = cls()
        except (TypeError, AccelerateHooksError):  # it has fields without a default
            found[name] = cls.example()
    return found


def _acts(policy: Policy, site: Site) -> bool:
    return site.kind in policy.kinds and bool(policy.acts(site))
