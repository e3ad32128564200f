"""Many models evaluated on a pool of actors."""

import pytest

from actors.contracts import EvaluationResult, EvaluationSpec, ModelRef, ModelSpec
from actors.evaluation import evaluate
from actors.evaluation.actor import evaluate_all_on_ray
from actors.models import materialize
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("ray_two_cpus")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[EvaluationSpec]:
    model = ModelRef(ModelSpec(save_tiny(tmp_path_factory.mktemp("pool") / "model", num_layers=4)))
    return [EvaluationSpec(model.without((i,)), tasks=("blimp_sample",), limit=20) for i in range(4)]


def _evaluate_here(spec: EvaluationSpec) -> EvaluationResult:
    model, tokenizer = materialize(spec.model)
    return evaluate(model, tokenizer, spec)


@pytest.mark.parametrize("actors", [1, 2, 9])
def test_a_pool_measures_what_one_process_does(specs: list[EvaluationSpec], actors: int) -> None:
    results = dict(evaluate_all_on_ray(specs, actors=actors, cpus=0.2, gpus=0, start_timeout_s=120))
    assert results == {i: _evaluate_here(spec) for i, spec in enumerate(specs)}
