"""Evaluation on a pool of actors: many models, or the requests of one; also when actors are lost."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.contracts import (
    ActorPoolSpec,
    EvaluationResult,
    EvaluationSpec,
    ModelRef,
    ModelSpec,
    PerplexitySpec,
    TextSpec,
)
from actors.errors import RequestError
from actors.evaluation import ray as actor
from actors.evaluation.evaluate import evaluate
from actors.evaluation.ray import EvalActor, evaluate_all_on_ray, evaluate_on_ray
from actors.models import build_model
from tests.support.tiny_models import save_tiny
from tests.unit.cli.command import iterabre

pytestmark = pytest.mark.usefixtures("ray_two_cpus")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[EvaluationSpec]:
    model = ModelRef(ModelSpec(save_tiny(tmp_path_factory.mktemp("pool") / "model", num_layers=4)))
    return [EvaluationSpec(model=model.without((i,)), tasks=("blimp_sample",), limit=20) for i in range(4)]


def _evaluate_here(spec: EvaluationSpec) -> EvaluationResult:
    model, tokenizer = build_model(spec.model)
    return evaluate(model, tokenizer, spec)


@pytest.mark.parametrize("actors", [1, 2, 9])
def test_a_pool_measures_what_one_process_does(specs: list[EvaluationSpec], actors: int) -> None:
    results = dict(evaluate_all_on_ray(specs, ActorPoolSpec(actors, 0.2, 0, start_timeout_s=120)))
    assert results == {i: _evaluate_here(spec) for i, spec in enumerate(specs)}


@pytest.fixture(scope="module")
def spec(specs: list[EvaluationSpec]) -> EvaluationSpec:
    """Choices, rolling texts and a text of its own, so that every kind of work is there."""
    text = PerplexitySpec("appendix", TextSpec(builtin="iterabre-appendix-a"), context=64, max_tokens=300)
    return replace(specs[0], perplexity=(text,), tasks=("blimp_sample", "wikitext2_prefix"), limit=30)


def _on_pool(spec: EvaluationSpec, actors: int) -> EvaluationResult:
    return evaluate_on_ray(spec, ActorPoolSpec(actors, cpus=0.4, gpus=0))


def _assert_same(found: EvaluationResult, expected: EvaluationResult) -> None:
    """The same metrics in the same order; sums of log-likelihoods differ in how batches round."""
    assert [(m.name, m.unit) for m in found.metrics] == [(m.name, m.unit) for m in expected.metrics]
    for mine, theirs in zip(found.metrics, expected.metrics, strict=True):
        assert mine.value == (theirs.value if "/acc" in mine.name else pytest.approx(theirs.value, rel=1e-5))
        assert mine.stderr == (theirs.stderr and pytest.approx(theirs.stderr, rel=1e-5))
    assert replace(found, metrics=()) == replace(expected, metrics=())


@pytest.mark.long
def test_requests_shared_out_give_what_one_process_does(spec: EvaluationSpec) -> None:
    _assert_same(_on_pool(spec, 3), _evaluate_here(spec))


def test_actors_killed_in_mid_task_change_no_number(
    spec: EvaluationSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of two actors are lost in the middle of a share; only those shares are answered again."""
    log = tmp_path / "shares"

    class Mortal(EvalActor):
        def respond(self, spec: EvaluationSpec, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
            with log.open("a") as file:
                file.write(f"{hash((kind, arguments[0][0], arguments[-1][-1]))}\n")
            responses = super().respond(spec, kind, arguments)
            if len(log.read_text().splitlines()) in (4, 9):
                os.kill(os.getpid(), signal.SIGKILL)
            return responses

    monkeypatch.setattr(actor, "EvalActor", Mortal)
    _assert_same(_on_pool(spec, 2), _evaluate_here(spec))
    assert len(log.read_text().splitlines()) > 2 * actor.SHARDS_PER_ACTOR


def test_one_actor_that_is_killed_is_called_again(
    spec: EvaluationSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"

    class Mortal(EvalActor):
        def evaluate(self, *arguments: Any) -> EvaluationResult:
            if not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().evaluate(*arguments)

    monkeypatch.setattr(actor, "EvalActor", Mortal)
    text = replace(spec, tasks=())
    _assert_same(_on_pool(text, 1), _evaluate_here(text))
    assert killed.exists()


def test_a_pool_asks_only_for_responses_that_are_not_kept(spec: EvaluationSpec, tmp_path: Path) -> None:
    def measured() -> EvaluationResult:
        pool = ActorPoolSpec(2, cpus=0.4, gpus=0)
        return evaluate_on_ray(spec, pool, parts_uri=str(tmp_path / "parts"))

    first = measured()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").iterdir()}
    lost = max((file for file in kept if file.name.startswith("responses-")), key=os.path.getsize)
    asked_again = set(json.loads(lost.read_text()))
    lost.unlink()
    _assert_same(measured(), first)
    new = [file for file in (tmp_path / "parts").iterdir() if file.stat().st_mtime_ns != kept.get(file)]
    assert {name for file in new for name in json.loads(file.read_text())} == asked_again


def test_an_unreadable_task_is_reported_as_it_is(specs: list[EvaluationSpec]) -> None:
    with pytest.raises(RequestError, match="'blimp_smaple'"):
        _on_pool(replace(specs[0], tasks=("blimp_smaple",)), 2)


def test_a_sweep_on_actors_gives_the_table_of_one_process(
    specs: list[EvaluationSpec], tmp_path: Path
) -> None:
    arguments = [
        "sweep", "--model", specs[0].model.source.path, "--layers", "0,2,3", "--probes",
        "degeneration,arithmetic", "--tasks", "blimp_sample", "--limit", "4", "--max-new-tokens", "6",
    ]  # fmt: skip
    here = iterabre(*arguments, "--output", tmp_path / "here")
    assert here.exit_code == 0, here.err
    address = ray.get_runtime_context().gcs_address
    pool = ["--output", str(tmp_path / "pool"), "--address", address, "--actors", "2", "--cpus", "0.5"]
    command = [sys.executable, "-m", "orchestrator.cli", *arguments, *pool]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "pool/sweep.csv").read_text()
    measured = {row.partition(",")[2] for row in table.splitlines()}
    assert len(measured) == 5, "a header, the unpruned model, and three prunings that differ"
    assert table == (tmp_path / "here/sweep.csv").read_text()
