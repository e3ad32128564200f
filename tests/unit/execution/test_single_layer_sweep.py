"""The single-layer sweep: same numbers as models loaded one by one, and what is written of them."""

import csv
import json
from pathlib import Path

import pytest

from actors.contracts import EvaluationSpec, ModelRef, ModelSpec
from actors.evaluation.evaluate import evaluate
from actors.models import build_model
from orchestrator.execution.single_layer_sweep import run_sweep, write_sweep
from tests.support.tiny_models import save_tiny
from tests.unit.cli.command import iterabre

PROBES = ("degeneration", "arithmetic")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("sweep") / "model", 4)


def test_numbers_are_those_of_models_loaded_one_by_one(model: str) -> None:
    spec = EvaluationSpec(model=ModelRef(ModelSpec(model)), probes=PROBES, limit=3, max_new_tokens=6)
    sweep = run_sweep(spec, [3, 0])
    assert sweep.layers == (3, 0)
    for position, ref in enumerate([spec.model, spec.model.without((3,)), spec.model.without((0,))]):
        expected = {m.name: m.value for m in evaluate(*build_model(ref), spec).metrics}
        found = {n: ([sweep.dense[n], *sweep.metrics[n]])[position] for n in sweep.dense}
        assert found == expected
    change = sweep.metrics["arithmetic/log_probability"][1] - sweep.dense["arithmetic/log_probability"]
    assert sweep.changes("arithmetic/log_probability")[1] == change != 0


def test_results_may_come_in_any_order(model: str) -> None:
    spec = EvaluationSpec(model=ModelRef(ModelSpec(model)), probes=("arithmetic",), limit=3)

    def backwards(specs):  # type: ignore[no-untyped-def]
        done = [(i, evaluate(*build_model(one.model), one)) for i, one in enumerate(specs)]
        return reversed(done)

    assert run_sweep(spec, range(4), backwards) == run_sweep(spec, range(4))


def test_the_command_writes_table_and_plots(model: str, tmp_path: Path) -> None:
    arguments = ("sweep", "--model", model, "--limit", 2, "--max-new-tokens", 4, "--layers", "1-2")
    answer = iterabre(*arguments, "--output", tmp_path / "out", "--json")
    assert answer.exit_code == 0, answer.err
    reported = json.loads(answer.out)
    assert reported == json.loads((tmp_path / "out/sweep.json").read_text())
    header, dense, *rows = csv.reader((tmp_path / "out/sweep.csv").open())
    assert header == ["removed_layer", *reported["dense"]]
    assert dense == ["none", *map(str, reported["dense"].values())]
    assert [row[0] for row in rows] == ["1", "2"]
    assert [float(row[1]) for row in rows] == reported["metrics"]["degeneration/repetition_4"]
    assert (tmp_path / "out/sweep.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "out/sweep.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "4"), "no layer 4: the model has layers 0 to 3"),
        (("--layers", "x"), "--layers 'x': write layers as 3,4 or 20-24"),
        (("--probes", "arithmetik"), "did you mean arithmetic?"),
        (("--probes", ""), "give --probes, --tasks or --suites"),
        (("--batch-size", "0"), "--batch-size '0': give a number of at least 1, or auto"),
        (("--suites", "reasonning"), "did you mean reasoning?"),
        (("--tasks", "blimp_sample", "--include-path", "no/folder"), "'no/folder', is not a folder"),
    ],
)
def test_wrong_requests_are_refused(
    model: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    answer = iterabre("sweep", "--model", model, "--output", tmp_path / "out", *arguments)
    assert answer.exit_code == 2
    assert message in answer.err
    assert not (tmp_path / "out").exists()


def test_a_sweep_writes_what_it_says_it_wrote(model: str, tmp_path: Path) -> None:
    spec = EvaluationSpec(model=ModelRef(ModelSpec(model)), probes=("arithmetic",), limit=2)
    assert all(file.is_file() for file in write_sweep(run_sweep(spec, [1]), tmp_path))
