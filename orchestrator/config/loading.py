"""Reading a campaign file: YAML, overrides from the command line, and errors that name the place."""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.config.campaign import CampaignConfig, SearchConfig
from orchestrator.config.search_space import variants
from orchestrator.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML that also reads `1e-4` as the number it looks like, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for key, _ in node.value if keys.count(key.value) > 1]
        if twice:
            problem = f"the key {twice[1].value!r} stands there twice"
            raise yaml.constructor.ConstructorError(None, None, problem, twice[1].start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)

_CREDENTIAL = re.compile(
    r"://[^:@?\s]+:[^@?\s]+@|[?&]\w*(access_key|secret_key|token|password)=|%3A%2F%2F[^&]+%40"
    r"|\bhf_[A-Za-z0-9]{24,}|\bA[KS]IA[A-Z0-9]{16}\b",
    re.IGNORECASE,
)
"""User and password in a URI, keys among its options, and what tokens of the hub and keys of AWS are like."""


def holds_credential(text: str) -> bool:
    """Return whether a text looks as if it should not be repeated."""
    return _CREDENTIAL.search(text) is not None


def load_config(path: str | Path, overrides: list[str] | None = None) -> CampaignConfig:
    """Read a campaign file and apply `--set a.b=c` overrides.

    Relative paths in it are of the current directory, or else of the file's own.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or a wrong value; names the place.
    """
    file = Path(path)
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"config file {str(path)!r} must hold a mapping with the keys name, models, methods…"
        )
    for override in overrides or []:
        _apply(raw, override)
    return parse_config(raw, str(path)).read_in((os.getcwd(), str(file.parent)))


def parse_config(raw: dict[str, Any], where: str) -> CampaignConfig:
    """Check an already read campaign file, its search spaces turned into concrete methods.

    Raises:
        ConfigError: every wrong field on a line of its own.
    """
    # First of all, as other messages repeat what they refuse.
    if lines := [*_credentials(raw)]:
        raise ConfigError("\n".join([f"{where} holds what runs would write down for all to read:", *lines]))
    methods, origins = _concrete_methods(raw)
    try:
        config = CampaignConfig.model_validate({**raw, "methods": methods} if origins else raw)
    except ValidationError as error:
        lines = [f"  {_dotted(_in_file(e['loc'], origins))}: {_plain(e)}" for e in error.errors()]
    else:
        lines = list(_wrong_overrides(config))
    if lines:
        raise ConfigError("\n".join([f"{where} is not a valid campaign file:", *dict.fromkeys(lines)]))
    return config


def _credentials(value: Any, *place: int | str) -> Iterator[str]:
    """Yield a line for every text with a credential in it, which the line does not repeat."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _credentials(part, *place, name)
    elif isinstance(value, list):
        for position, part in enumerate(value):
            yield from _credentials(part, *place, position)
    elif isinstance(value, str) and holds_credential(value):
        yield (
            f"  {_dotted(place)}: holds a password, token or key; take it out, and give it by the "
            "environment (HF_TOKEN, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or the machine's own role"
        )


def _concrete_methods(raw: dict[str, Any]) -> tuple[list[Any], list[int]]:
    """Return every method with its spaces filled in, and the position in the file that each comes from."""
    given = raw.get("methods")
    if not isinstance(given, list):
        return [], []
    try:
        search = SearchConfig.model_validate(raw.get("search", {}))
    except ValidationError:
        search = SearchConfig()  # The file is refused anyway, with the reason.
    methods: list[Any] = []
    origins: list[int] = []
    for position, method in enumerate(given):
        made = (
            variants(method, search.samples, search.seed, f"methods.{position}")
            if isinstance(method, dict)
            else [method]
        )
        methods.extend(made)
        origins.extend([position] * len(made))
    return methods, origins


def _in_file(location: tuple[int | str, ...], origins: list[int]) -> tuple[int | str, ...]:
    """Return the place in the file that an error in a concrete method comes from."""
    match location:
        case ("methods", int(position), *rest):
            return ("methods", origins[position], *rest)
    return location


def _wrong_overrides(config: CampaignConfig) -> Iterator[str]:
    """Yield a line for every override that its section does not take."""
    for position, model in enumerate(config.models):
        place = ("models", position, "overrides")
        yield from _errors(partial(config.evaluation_for, model), (*place, "evaluation"))
        for method in config.methods:
            yield from _errors(partial(config.method_for, model, method), place)


def _errors(check: Callable[[], object], place: tuple[int | str, ...]) -> Iterator[str]:
    try:
        check()
    except ValidationError as error:
        for e in error.errors():
            yield f"  {_dotted((*place, *e['loc']))}: {_plain(e)}"


def _plain(error: Any) -> str:
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return "unknown key; see docs/configuration.md for the known ones"
    message = error["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    return message if error["type"] == "missing" else f"{message} (got {error['input']!r})"


def _dotted(location: tuple[int | str, ...]) -> str:
    dotted = ".".join(str(part) for part in location) or "(top level)"
    return re.sub(r"\btuple\[(\w+), \.\.\.\]", r"list[\1]", dotted)  # YAML has lists


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one field, e.g. `methods.0.recovery.learning_rate=1e-4`; the value is YAML.

    A list, even one that the file leaves out, can be given one more value at its end: `seeds.0=1`.
    """
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override!r}: write it as path.to.field=value")
    parts = path.split(".")
    *parents, last = parts
    place: Any = raw
    for part, following in zip(parents, parts[1:], strict=True):
        if isinstance(place, list):
            place = place[_position(place, part, override)]
        else:
            place = place.setdefault(part, [] if following.isdecimal() else {})
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"--set {override!r}: {part!r} holds a value, not a section")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {text!r} is no YAML value") from error
    if isinstance(place, list) and last == str(len(place)):
        place.append(value)
    elif isinstance(place, list):
        place[_position(place, last, override)] = value
    else:
        place[last] = value


def _position(place: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        raise ConfigError(f"--set {override!r}: {part!r} is no position in a list of {len(place)}, from 0")
    return int(part)
