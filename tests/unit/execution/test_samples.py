"""Samples of a campaign's tasks: with the files of each evaluation, and of no consequence for its key."""

import json
from pathlib import Path
from typing import Any

from orchestrator.storage.ledger import Ledger
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import Answer, iterabre


def _run(campaign: dict[str, Any], place: Path, *options: str) -> Answer:
    answer = iterabre("campaign", write_campaign(campaign, place / "campaign.yaml"), *options)
    assert answer.exit_code == 0, answer.err
    return answer


def _samples(place: Path) -> list[Path]:
    return sorted((place / "runs/tiny/stages/evaluate").rglob("samples_*.jsonl"))


def test_samples_lie_with_the_files_of_each_evaluation(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["methods"][0]["recovery"] = {"objective": "none"}
    campaign["targets"] = [{"layers": 3}]
    campaign["evaluation"] |= {"tasks": ["blimp_sample"], "limit": 3, "log_samples": True}
    _run(campaign, tmp_path)
    rows = Ledger(f"{tmp_path}/runs/tiny/ledger").read().to_pylist()
    accuracy = {row["key"]: row["value"] for row in rows if row["metric"] == "blimp_sample/acc"}
    files = {file.parents[1].name: file for file in _samples(tmp_path)}
    assert set(files) == set(accuracy)
    assert len(files) == 2  # the dense model and the pruned one, which is not healed
    for key, file in files.items():
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        assert sum(sample["acc"] for sample in samples) / 3 == accuracy[key]
    _run(campaign, tmp_path, "--resume")
    assert sorted(files.values()) == _samples(tmp_path)


def test_switched_on_later_they_are_written_of_what_is_measured_from_then_on(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["methods"][0]["recovery"] = {"objective": "none"}
    campaign["targets"] = [{"layers": 3}]
    campaign["evaluation"] |= {"tasks": ["blimp_sample"], "limit": 3}
    _run(campaign, tmp_path)
    before = Ledger(f"{tmp_path}/runs/tiny/ledger").read().to_pylist()
    campaign["evaluation"]["log_samples"] = True
    _run(campaign, tmp_path, "--resume")
    assert Ledger(f"{tmp_path}/runs/tiny/ledger").read().to_pylist() == before
    assert not _samples(tmp_path)
    campaign["targets"].append({"layers": 2})
    _run(campaign, tmp_path, "--resume")
    assert len(_samples(tmp_path)) == 1
