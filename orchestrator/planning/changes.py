"""What has changed since a run was recorded, field by field, and what each change means for its results."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from actors.contracts.settings import NotInKey, section_in
from orchestrator.config import EvaluationConfig, MethodConfig, holds_credential
from orchestrator.config.section import SECTIONS, fields_of
from orchestrator.planning.keys import PRECISION

Path = tuple[str, ...]
"""A field of a campaign file, by its parts; the entry of a list by its name."""

NAMED: Mapping[Path, str] = {("models",): "id", ("methods",): "name", ("evaluation", "perplexity"): "name"}
"""Lists of which each entry has a name, so that its position says nothing."""

SETS = {
    ("targets",),
    ("seeds",),
    ("exclude",),
    ("evaluation", "tasks"),
    ("evaluation", "suites"),
    ("evaluation", "probes"),
}
"""Lists that only hold entries or not."""

DEEPSPEED = ("execution", "training", "deepspeed")


class Effect(Enum):
    """What a change means, in words for the user; in the order in which they are shown."""

    CONTRADICTION = "contradicts what the run is of"
    AGAIN = "computed again, where a stage depends on it"
    NEW = "new"
    LEFT_OUT = "no longer asked for; results are kept"
    HARMLESS = "changes no result"


@dataclass(frozen=True)
class Change:
    """A field that has changed; `before` or `now` is None where it was not or is no longer given."""

    effect: Effect
    field: str
    before: str | None = None
    now: str | None = None

    def __str__(self) -> str:
        if self.before is None and self.now is None:
            return self.field
        return f"{self.field}: {self.before or '(not given)'} → {self.now or '(not given)'}"


@dataclass(frozen=True)
class RunRecord:
    """What a run is of.

    Attributes:
        config: the campaign file as JSON values, with its defaults.
        contents: the hash of each model, text and folder of tasks, or what else identifies it, by the field
            that names it; without those that are not known.
        deepspeed: the content of the user's DeepSpeed JSON; None if it is not known.
        commits: those of models and texts of the hub, by the same fields.
        versions: of packages.
    """

    config: Mapping[str, Any]
    contents: Mapping[Path, str] = field(default_factory=dict)
    deepspeed: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commits: Mapping[Path, str] = field(default_factory=dict)


def compare(recorded: RunRecord, now: RunRecord) -> list[Change]:
    """Return what has changed from one record of a run to the next, what matters most first.

    What a field names is known by its content: a model or text that was moved is the same one, and one
    that was edited in place is another.
    """
    before, after = _flatten(recorded.config), _flatten(now.config)
    entries_before, entries_after = _entries(before), _entries(after)
    changes: list[Change] = []
    for entry in sorted(entries_before ^ entries_after):
        more_runs = (entry in entries_after) != (entry[0] == "exclude")
        name = ": ".join((".".join(entry[:-1]), entry[-1]))
        changes.append(Change(Effect.NEW if more_runs else Effect.LEFT_OUT, name))
    common = entries_before & entries_after
    edited = [
        path
        for path in _differing(before, after)
        if _entries([path]) <= common  # else the entry as a whole is new or left out
    ]
    contents = {path: now.contents.get(path) for path in recorded.contents}
    same = {path for path, text in contents.items() if text == recorded.contents[path]}
    explained: set[Path] = set()
    for path in edited:
        effect = _effect(path, before.get(path), after.get(path))
        effect = Effect.HARMLESS if _named_by(path) & same else effect
        changes.append(_change(effect, path, before.get(path), after.get(path)))
        explained |= set() if effect is Effect.HARMLESS else _named_by(path)
    for path, text in sorted(contents.items()):
        # The field is written as before: a file was edited, or a branch has a new commit.
        if text is not None and path not in same | explained:
            is_model = path[0] == "models" and len(path) == 2
            effect = Effect.CONTRADICTION if is_model else Effect.AGAIN
            if path in recorded.commits and path in now.commits:
                commits = recorded.commits[path], now.commits[path]
                changes.append(Change(effect, f"{'.'.join(path)} (commit)", *commits))
            else:
                name = f"{'.'.join(path)} (content)"
                changes.append(Change(effect, name, recorded.contents[path][:12], text[:12]))
    if recorded.deepspeed is not None and now.deepspeed is not None:
        before, after = _flatten(recorded.deepspeed), _flatten(now.deepspeed)
        for path in _differing(before, after):
            effect = Effect.AGAIN if path[0] in PRECISION else Effect.HARMLESS
            changes.append(_change(effect, (*DEEPSPEED, *path), before.get(path), after.get(path)))
    for package in _differing(recorded.versions, now.versions):
        before_it, after_it = recorded.versions.get(package), now.versions.get(package)
        changes.append(Change(Effect.HARMLESS, f"version of {package}", before_it, after_it))
    order = list(Effect)
    return sorted(changes, key=lambda change: order.index(change.effect))


def described(changes: Sequence[Change]) -> str:
    """Return the changes in lines for the user, by what they mean."""
    lines: list[str] = []
    for effect in Effect:
        fields = [f"    {change}" for change in changes if change.effect is effect]
        lines += [f"  {effect.value}:", *fields] if fields else []
    return "\n".join(lines)


def _named_by(path: Path) -> set[Path]:
    """Return the fields that may name a model or text of which `path` is a setting."""
    inside = {path[:length] for length in range(1, len(path) + 1)}
    return inside - {path[:2]} if path[0] == "models" and "overrides" in path else inside


def _effect(path: Path, before: str | None, after: str | None) -> Effect:
    """Return what a change of a field means whose content is another, or has none."""
    if path[0] == "models" and path[2:3] == ("overrides",):
        path = path[3:] if path[3] == "evaluation" else ("methods", "", *path[3:])
    match path:
        case ("name",) | ("models", _, "path" | "dtype" | "revision"):
            return Effect.CONTRADICTION
        # Not in the key but for `topk`, which stores less than the teacher says.
        case ("methods", _, "recovery", "teacher_cache") if '"topk"' in (before, after):
            return Effect.AGAIN
        case ("methods", _, "recovery", "teacher_top_k"):
            return Effect.AGAIN
        case ("methods", _, *rest) if rest != ["priority"] and _in_key(MethodConfig, rest):
            return Effect.AGAIN
        case ("evaluation", "at" | "also_before_recovery"):
            return Effect.NEW
        case ("evaluation", "throughput", *_) if before is None or after is None:
            return Effect.NEW if before is None else Effect.LEFT_OUT
        case ("evaluation", *rest) if _in_key(EvaluationConfig, rest):
            return Effect.AGAIN
    return Effect.HARMLESS


def _in_key(section: Any, path: Sequence[str]) -> bool:
    """Return whether a field of a section is one that results depend on."""
    for name in path:
        found = fields_of(section).get(name)
        if found is not None and any(isinstance(mark, NotInKey) for mark in found.metadata):
            return False
        section = section_in(found.annotation, *SECTIONS) if found is not None else None
        if section is None:
            break
    return True


def _change(effect: Effect, path: Path, before: str | None, now: str | None) -> Change:
    return Change(effect, ".".join(path), before, now)


def _differing(before: Mapping[Any, str], after: Mapping[Any, str]) -> list[Any]:
    return [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]


def _entries(paths: Iterable[Path]) -> set[Path]:
    """Return the entries of the lists whose entries have names, or are names."""
    lists = (*NAMED, *SETS)
    return {path[: len(each) + 1] for path in paths for each in lists if path[: len(each)] == each}


def _flatten(value: Any, path: Path = ()) -> dict[Path, str]:
    """Return the text of every field that has a value, by its path."""
    if path in NAMED:
        value = {item[NAMED[path]]: item for item in value}
    elif path in SETS:
        return {(*path, _entry(item)): "" for item in value or ()}
    if isinstance(value, Mapping):
        return {
            p: text for name, item in value.items() for p, text in _flatten(item, (*path, str(name))).items()
        }
    if value is None:
        return {}
    text = json.dumps(value)
    return {path: "(a credential)" if holds_credential(text) else text}


def _entry(item: Any) -> str:
    if isinstance(item, Mapping):
        return ", ".join(f"{name}={value}" for name, value in item.items() if value is not None)
    return str(item)
