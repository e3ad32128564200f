"""A run that goes on with another campaign file: what is new or has changed is computed, nothing else."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.local import LocalBackend
from orchestrator.storage.ledger import Ledger
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.support.tiny_models import save_tiny
from tests.unit.cli.command import Answer, iterabre

KINDS = ("score", "recover", "evaluate", "export")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Every stage that is computed, by its kind and spec."""
    found: list[tuple[str, Any]] = []

    def noted(kind: str) -> Any:
        compute = getattr(LocalBackend, kind)

        def note(self: LocalBackend, spec: Any, *more: Any) -> Any:
            found.append((kind, spec))
            return compute(self, spec, *more)

        return note

    for kind in KINDS:
        monkeypatch.setattr(LocalBackend, kind, noted(kind))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growth")


def _method(campaign: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**campaign["methods"][0], **fields}


@pytest.fixture(scope="module")
def small(place: Path) -> dict[str, Any]:
    """2 methods × 1 target; the files that it names may be edited by a test that copies them."""
    campaign = tiny_campaign(place)
    campaign["methods"].append(_method(campaign, name="plain", recovery={"objective": "none"}))
    campaign["targets"] = [{"layers": 3}]
    answer = iterabre("campaign", write_campaign(campaign, place / "small.yaml"))
    assert answer.exit_code == 0, answer.err
    return campaign


@pytest.fixture
def run(place: Path, small: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the finished small run, which is of 2 trajectories."""
    shutil.copytree(place / "runs/tiny", tmp_path / "runs/tiny")
    return tmp_path / "runs/tiny"


def _resume(run: Path, campaign: dict[str, Any], *options: str) -> Answer:
    raw = {**campaign, "storage": {"path": str(run.parent)}}
    return iterabre("campaign", write_campaign(raw, run.parent / "c.yaml"), "--resume", *options)


def _manifests(run: Path) -> dict[str, int]:
    return {str(file.parent): file.stat().st_mtime_ns for file in run.glob("stages/*/*/manifest.json")}


def _numbers(run: Path) -> list[tuple[Any, ...]]:
    rows = Ledger(str(run / "ledger")).read().to_pylist()
    names = ("trajectory", "iteration", "stage", "phase", "metric", "step", "layer", "value")
    return sorted(
        tuple(str(row[name]) for name in names)
        for row in rows
        if row["unit"] not in ("s", "tokens/s", "bytes", "forwards")
    )


def test_a_run_grows_by_methods_targets_and_seeds(
    run: Path, small: dict[str, Any], computed: list[tuple[str, Any]], tmp_path: Path
) -> None:
    before = _manifests(run)
    # The unpruned model and the scores; the pruned model and its export; the recovery, its model and export.
    assert len(before) == 2 + 2 + 3
    grown = {
        **small,
        "methods": [_method(small, name="deepest", scoring={"criterion": "deepest"}), *small["methods"]],
        "targets": [{"layers": 3}, {"layers": 1}, {"layers": 2}],
        "seeds": [0, 1],
    }
    answer = _resume(run, grown)
    assert answer.exit_code == 0, answer.err
    for line in ("methods: deepest", "targets: layers=1", "targets: layers=2", "seeds: 1"):
        assert f"    {line}\n" in answer.err
    after = _manifests(run)
    assert {name: after[name] for name in before} == before
    assert len(computed) == len(after) - len(before)
    left = json.loads(iterabre("plan", run.parent / "c.yaml", "--json").out)["stages"]
    assert left["to_run"] == 0

    # As if it had been asked for at once.
    computed.clear()
    fresh = {**grown, "storage": {"path": str(tmp_path / "fresh")}}
    assert iterabre("campaign", write_campaign(fresh, tmp_path / "fresh.yaml")).exit_code == 0
    assert len(computed) == len(after)
    assert _numbers(run) == _numbers(tmp_path / "fresh/tiny")


def test_a_run_grows_by_models(
    run: Path, small: dict[str, Any], computed: list[tuple[str, Any]], tmp_path: Path
) -> None:
    other = {"id": "other", "path": save_tiny(tmp_path / "other", num_layers=6)}
    answer = _resume(run, {**small, "models": [*small["models"], other]})
    assert answer.exit_code == 0, answer.err
    assert "    models: other\n" in answer.err
    assert {spec.model.source.path for _, spec in computed} == {other["path"]}


def test_of_a_larger_evaluation_only_what_is_new_is_measured(
    run: Path, small: dict[str, Any], computed: list[tuple[str, Any]], tmp_path: Path
) -> None:
    (text,) = small["evaluation"]["perplexity"]
    evaluation = {
        "perplexity": [{**text, "name": "shorter", "max_tokens": 64}, text],
        "tasks": ["blimp_sample"],
        "limit": 3,
    }
    before = _manifests(run)
    grown = {**small, "evaluation": evaluation, "targets": [{"layers": 3}, {"layers": 2}]}
    answer = _resume(run, grown)
    assert answer.exit_code == 0, answer.err
    assert "    evaluation.tasks: blimp_sample\n" in answer.err
    assert "    evaluation.perplexity: shorter\n" in answer.err
    assert {name: _manifests(run)[name] for name in before} == before
    texts = Counter(
        (len(spec.model.dropped), tuple(text.name for text in spec.perplexity), spec.tasks)
        for kind, spec in computed
        if kind == "evaluate"
    )
    # Three models were measured before: unpruned, pruned and recovered. The next depth is measured in one go.
    assert texts == {
        (0, ("shorter",), ("blimp_sample",)): 1,
        (1, ("shorter",), ("blimp_sample",)): 2,
        (2, ("shorter", "fox"), ("blimp_sample",)): 3,
    }
    scores = json.loads((run / "models/llama--iterabre--seed0/3-layers/iterabre.json").read_text())["scores"]
    assert {"fox/token_perplexity", "shorter/token_perplexity", "blimp_sample/acc"} <= scores.keys()

    # The next resume finds both parts; with the old file, it goes back to what was asked for first.
    computed.clear()
    assert _resume(run, grown).exit_code == 0
    assert computed == []
    fewer = _resume(run, {**small, "targets": grown["targets"]})
    assert fewer.exit_code == 0, fewer.err
    assert "no longer asked for; results are kept:\n    evaluation.perplexity: shorter\n" in fewer.err
    assert computed == []


def test_a_smaller_seed_leaves_evaluations_as_they_are(
    run: Path, small: dict[str, Any], computed: list[tuple[str, Any]], tmp_path: Path
) -> None:
    late = tmp_path / "late"
    raw = {**small, "seeds": [3], "methods": small["methods"][1:], "storage": {"path": str(late)}}
    assert iterabre("campaign", write_campaign(raw, tmp_path / "late.yaml")).exit_code == 0
    computed.clear()
    assert _resume(late / "tiny", {**raw, "seeds": [0, 3]}).exit_code == 0
    # A method without anything drawn: all seeds are one.
    assert {kind for kind, _ in computed} == {"export"}


def test_a_changed_method_takes_the_place_of_what_it_was(
    run: Path, small: dict[str, Any], computed: list[tuple[str, Any]], tmp_path: Path
) -> None:
    recovery = {**small["methods"][0]["recovery"], "max_tokens": 128}
    changed = {**small, "methods": [_method(small, recovery=recovery), small["methods"][1]]}
    answer = _resume(run, changed)
    assert answer.exit_code == 0, answer.err
    assert "computed again" in answer.err
    assert "    methods.iterabre.recovery.max_tokens: 96 → 128\n" in answer.err
    assert [kind for kind, _ in computed] == ["recover", "evaluate", "export"]
    fresh = {**changed, "storage": {"path": str(tmp_path / "fresh")}}
    assert iterabre("campaign", write_campaign(fresh, tmp_path / "fresh.yaml")).exit_code == 0
    assert _numbers(run) == _numbers(tmp_path / "fresh/tiny")
    card = (run / "models/llama--iterabre--seed0/3-layers/README.md").read_text()
    assert "| tokens | 128" in card
    former = json.loads((run / "campaign.json").read_text())["former"]
    assert former[-1]["config"]["methods"][0]["recovery"]["max_tokens"] == 96
    assert len(list((run / "superseded").glob("*.parquet"))) == 3


def test_an_edited_file_is_found(
    run: Path, small: dict[str, Any], computed: list[tuple[str, Any]], place: Path, tmp_path: Path
) -> None:
    text = place / "text.txt"
    former = text.read_text()
    text.write_text(former.replace("lazy dog", "calm cat"))
    try:
        answer = _resume(run, small)
    finally:
        text.write_text(former)
    assert answer.exit_code == 0, answer.err
    for field in ("methods.iterabre.recovery.data", "evaluation.perplexity.fox.data"):
        assert f"    {field} (content): " in answer.err
    assert Counter(kind for kind, _ in computed) == {"score": 1, "recover": 1, "evaluate": 3, "export": 1}


def test_an_edited_deepspeed_optimizer_is_found(run: Path, small: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}, "steps_per_print": 5}))
    execution = {"backend": "local", "training": {"deepspeed": str(file)}}
    first = _resume(run, {**small, "execution": execution})
    assert first.exit_code == 0, first.err
    assert "execution.training.deepspeed.steps_per_print" in first.err.partition("changes no result")[2]
    changed = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-3}}}
    file.write_text(json.dumps(changed))
    again = iterabre("plan", run.parent / "c.yaml")
    assert 'deepspeed.optimizer.type: (not given) → "AdamW" (computed again' in again.out


def test_another_model_under_the_same_id_is_refused_until_it_is_accepted(
    run: Path, small: dict[str, Any], computed: list[tuple[str, Any]], tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", num_layers=5)
    changed = {**small, "models": [{"id": "llama", "path": other}]}
    before = _manifests(run)
    answer = _resume(run, changed)
    assert answer.exit_code == 2
    assert "models.llama.path: " in answer.err
    assert "--accept-changes" in answer.err
    assert (_manifests(run), computed) == (before, [])
    accepted = _resume(run, changed, "--accept-changes")
    assert accepted.exit_code == 0, accepted.err
    fresh = {**changed, "storage": {"path": str(tmp_path / "fresh")}}
    assert iterabre("campaign", write_campaign(fresh, tmp_path / "fresh.yaml")).exit_code == 0
    assert _numbers(run) == _numbers(tmp_path / "fresh/tiny")


def test_what_changes_no_result_is_told_and_goes_on(
    run: Path, small: dict[str, Any], computed: list[tuple[str, Any]]
) -> None:
    methods = [_method(small, recovery={**small["methods"][0]["recovery"], "micro_batch_size": 2})]
    answer = _resume(run, {**small, "methods": [*methods, small["methods"][1]]})
    assert answer.exit_code == 0, answer.err
    told = answer.err.partition("changes no result")[2]
    assert "methods.iterabre.recovery.micro_batch_size: 1 → 2" in told
    assert computed == []
