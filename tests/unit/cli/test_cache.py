"""A second campaign with the same `storage.cache` computes what is new; `iterabre cache` looks after it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre


def _stages(root: Path) -> set[tuple[str, str]]:
    return {(m.parts[-3], m.parts[-2]) for m in root.glob("stages/*/*/manifest.json")}


def _numbers(run: Path) -> list[Any]:
    return json.loads(iterabre("status", run, "--json").out)["iterations"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign with a cache that has run."""
    place = tmp_path_factory.mktemp("shared")
    campaign = tiny_campaign(place) | {"targets": [{"layers": 3}], "name": "first"}
    campaign["storage"]["cache"] = str(place / "cache")
    assert iterabre("campaign", write_campaign(campaign, place / "first.yaml")).exit_code == 0
    return place


def test_a_second_campaign_computes_only_what_is_new(place: Path) -> None:
    before = _stages(place / "cache")
    assert {kind for kind, _ in before} == {"score", "recover", "evaluate"}
    assert {kind for kind, _ in _stages(place / "runs/first")} == {"export"}
    campaign = tiny_campaign(place) | {"targets": [{"layers": 3}], "name": "second"}
    campaign["storage"]["cache"] = str(place / "cache")
    recovery = campaign["methods"][0]["recovery"] | {"adapter": {"rank": 2}}
    campaign["methods"].append(campaign["methods"][0] | {"name": "narrow", "recovery": recovery})
    file = write_campaign(campaign, place / "second.yaml")
    planned = iterabre("plan", file, "--json")
    assert planned.exit_code == 0
    assert iterabre("campaign", file).exit_code == 0
    new = sorted(kind for kind, _ in _stages(place / "cache") - before)
    assert new == ["evaluate", "recover"], "of the narrow method; scores and the dense baseline are there"
    first, second = _numbers(place / "runs/first"), _numbers(place / "runs/second")
    same = [line for line in second if line["trajectory"] == "llama--iterabre--seed0"]
    assert [line | {"export_s": 0} for line in same] == [line | {"export_s": 0} for line in first]
    assert len(second) == 2 * len(first)
    assert iterabre("report", place / "runs/second").exit_code == 0
    answer = iterabre(
        "export", place / "runs/second", "--trajectory", "llama--narrow--seed0", "--iteration", 1,
        "--output", place / "out",
    )  # fmt: skip
    assert answer.exit_code == 0, answer.err


def test_the_cache_is_listed_verified_and_pruned(place: Path) -> None:
    listed = json.loads(iterabre("cache", "list", place / "cache", "--json").out)
    assert {(stage["kind"], stage["key"]) for stage in listed} == _stages(place / "cache")
    assert "recover" in iterabre("cache", "list", place / "cache").out
    assert "0 were damaged" in iterabre("cache", "verify", place / "cache").out
    kept = iterabre("cache", "prune", place / "cache", "--keep-gb", 0)
    assert "0 of" in kept.out, "all was used today"
    for file in place.glob("cache/stages/*/*/*"):
        os.utime(file, (1e9, 1e9))
    for file in place.glob("cache/stages/*/*/*/*"):
        os.utime(file, (1e9, 1e9))
    shown = iterabre("cache", "prune", place / "cache", "--unused-days", 30, "--dry-run")
    assert f"{len(listed)} of {len(listed)} stages would be removed" in shown.out
    assert len(_stages(place / "cache")) == len(listed)
    assert iterabre("cache", "prune", place / "cache", "--unused-days", 30).exit_code == 0
    assert not _stages(place / "cache")


def test_wrong_requests_are_refused(place: Path, tmp_path: Path) -> None:
    nothing = iterabre("cache", "prune", place / "cache")
    assert nothing.exit_code == 2
    assert "--unused-days, --keep-gb, or both" in nothing.err
    missing = iterabre("cache", "list", tmp_path / "none")
    assert missing.exit_code == 2
    assert "there is no cache at" in missing.err
