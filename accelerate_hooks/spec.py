"""Policies as text: `lazy_step:threshold=0.1+token_merge@*.attn*:ratio=0.5`.

    spec     = policy {'+' policy}, or the path of a recipe (.json, .yaml, .yml)
    policy   = name ['@' glob] [':' setting {',' setting}]
    setting  = field '=' value
    value    = a JSON literal, inf, -inf, a bare word, or anything else in single quotes
    glob     = without blanks, quotes and : + , as it is, anything else in single quotes

Inside single quotes '' is a quote. A `+` outside quotes and brackets joins, so 1e+16 is written
1e16 or '1e+16'. Blanks around parts do not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, cast

from accelerate_hooks._settings import changed, checked, did_you_mean, literal, plain, refuse
from accelerate_hooks.errors import ArtifactError, SpecError
from accelerate_hooks.recipe import Addressed, is_recipe, load_recipe, save_recipe
from accelerate_hooks.registry import PolicyRegistry

if TYPE_CHECKING:
    from accelerate_hooks.policy import Policy

__all__ = ["Addressed", "is_recipe", "load_recipe", "parse", "render", "save_recipe"]

BLANK = re.compile(r"\s*")
NAME = re.compile(r"[\w.-]+")
QUOTED = re.compile(r"'((?:[^']|'')*)'")
GLOB = re.compile(r"[^\s':+,]+")
WORD = re.compile(r"""[^\s'"+,:=@\[\]{}]+""")
CUT_EXPONENT = re.compile(r"-?[\d.]+[eE]")
JSON = json.JSONDecoder(parse_constant=refuse)
# What `render` leaves without quotes.
BARE_WORD = re.compile(r"[A-Za-z_][\w./-]*")
BARE_GLOB = re.compile(r"[\w.*?\[\]!-]+")


def parse(spec: str, registry: Mapping[str, type[Policy]] | None = None) -> list[Addressed]:
    """The policies that a spec, or the recipe it is the path of, describes.

    registry: policy classes by name; None for all that are installed.

    Raises SpecError naming the offending piece, its position and what may have been meant;
    ArtifactError for an artifact and RecipeError for a recipe that cannot be used.
    """
    if not isinstance(spec, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(f"a spec is a string, not {type(spec).__name__}")
    if is_recipe(spec):
        return load_recipe(spec.strip(), registry)
    return _Reader(spec, PolicyRegistry() if registry is None else registry).policies()


def render(policy: Policy, only: str | None = None) -> str:
    """The shortest spec of a policy: `parse(render(p, glob)) == [Addressed(p, glob)]`."""
    text = policy.name
    if only is not None:
        text += "@" + _quoted_unless(BARE_GLOB, only)
    if settings := changed(policy):
        text += ":" + ",".join(f"{name}={_value(value)}" for name, value in settings.items())
    return text


def _value(value: Any) -> str:
    value = plain(value)
    if isinstance(value, str):
        # The words true, null and inf mean something else without quotes.
        return _quoted_unless(BARE_WORD, value) if literal(value) is value else _quoted(value)
    return _json(value)


def _json(value: Any) -> str:
    if isinstance(value, float):
        return repr(value).replace("e+", "e")
    if isinstance(value, list):
        return f"[{','.join(_json(item) for item in cast('list[Any]', value))}]"
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return f"{{{','.join(f'{json.dumps(key)}:{_json(item)}' for key, item in items)}}}"
    return json.dumps(value, ensure_ascii=False, default=str)


def _quoted_unless(bare: re.Pattern[str], text: str) -> str:
    return text if bare.fullmatch(text) and not is_recipe(text) else _quoted(text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


class _Reader:
    def __init__(self, spec: str, registry: Mapping[str, type[Policy]]) -> None:
        self.spec, self.registry, self.at = spec, registry, 0

    def policies(self) -> list[Addressed]:
        found = [self.policy()]
        while self.take("+"):
            found.append(self.policy())
        if self.at < len(self.spec):
            self.fail(f"{self.spec[self.at :]!r} is not expected; write what is not a word in ''")
        return found

    def policy(self) -> Addressed:
        name = self.match(NAME) or self.fail("a policy's name is expected")
        start = self.at - len(name)
        try:
            cls = self.registry[name]
        except KeyError:
            known = ", ".join(self.registry) or "none"
            near = did_you_mean(name, self.registry)
            self.fail(f"there is no policy {name!r}{near} (known: {known})", start)
        except SpecError as error:
            self.fail(str(error), start, error)
        only = self.glob() if self.take("@") else None
        settings: dict[str, Any] = {}
        more = self.take(":")
        while more:
            self.setting(cls, settings)
            more = self.take(",")
        try:
            return Addressed(cls(**settings), only)
        except ArtifactError:
            raise
        except (TypeError, ValueError) as error:
            self.fail(f"{self.spec[start : self.at]!r}: {error}", start, error)

    def setting(self, cls: type[Policy], settings: dict[str, Any]) -> None:
        name = self.match(NAME) or self.fail(f"a field of {cls.name} is expected")
        start = self.at - len(name)
        if name in settings:
            self.fail(f"{name!r} is given twice", start)
        if not self.take("="):
            self.fail(f"{name!r} needs a value, as in {name}=1")
        value = self.value()
        try:
            settings[name] = checked(cls, name, value)
        except SpecError as error:
            self.fail(str(error), start, error)

    def value(self) -> Any:
        self.match(BLANK)
        if self.spec[self.at : self.at + 1] in tuple('[{"'):
            try:
                value, self.at = JSON.raw_decode(self.spec, self.at)
            except ValueError as error:
                self.fail(f"not JSON: {error}")
            return value
        if (text := self.quoted()) is not None:
            return text
        word = self.match(WORD) or self.fail("a value is expected; the empty one is ''")
        if CUT_EXPONENT.fullmatch(word) and (rest := re.match(r"\+(\d+)", self.spec[self.at :])):
            n = rest[1]
            self.fail(f"write {word}{n} or '{word}+{n}' for {word}+{n}: a + outside quotes joins")
        return literal(word)

    def glob(self) -> str:
        text = self.quoted()
        return self.match(GLOB) or self.fail("a glob is expected") if text is None else text

    def quoted(self) -> str | None:
        if (text := self.match(QUOTED)) is not None:
            return text[1:-1].replace("''", "'")
        if self.spec.startswith("'", self.at):
            self.fail("this quote is never closed")
        return None

    def match(self, pattern: re.Pattern[str]) -> str | None:
        self.at = cast("re.Match[str]", BLANK.match(self.spec, self.at)).end()
        found = pattern.match(self.spec, self.at)
        self.at = found.end() if found else self.at
        return found.group() if found else None

    def take(self, mark: str) -> bool:
        return self.match(re.compile(re.escape(mark))) is not None

    def fail(self, message: str, at: int | None = None, cause: Exception | None = None) -> NoReturn:
        at = self.at if at is None else at
        raise SpecError(f"{message} (at position {at} of {self.spec!r})") from cause
