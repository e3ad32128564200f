"""Layers that somebody has chosen: a list of those that go, and those that stay whatever they score."""

import pytest

from actors.contracts import ModelRef, ModelSpec, ScoreSpec, TextSpec
from actors.errors import RequestError
from actors.scoring import score_locally
from actors.scoring.criteria import removal_order
from tests.support.tiny_models import save_tiny
from tests.unit.scoring.plain import PLAIN

TEXT = TextSpec(builtin="iterabre-appendix-a")
RUNS = ("angular_block", "bridge_residual")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(save_tiny(tmp_path_factory.mktemp("model"), num_layers=7))


def test_a_list_is_taken_in_its_order(source: ModelSpec) -> None:
    spec = ScoreSpec(
        model=ModelRef(source), calibration=TEXT, criterion="fixed", layers=(5, 2, 4), stream_weights=False
    )
    result = score_locally(spec)
    assert result.removal_order == (5, 2, 4)
    assert dict(zip(result.source_layers, result.scores, strict=True)) == {
        0: 0, 1: 0, 2: 2, 3: 0, 4: 1, 5: 3, 6: 0,
    }  # fmt: skip


def test_of_a_pruned_model_the_rest_of_the_list_is_left(source: ModelSpec) -> None:
    spec = ScoreSpec(
        model=ModelRef(source, dropped=(1, 5)), calibration=TEXT, criterion="fixed", layers=(5, 2, 4)
    )
    result = score_locally(spec)
    assert (result.source_layers, result.removal_order) == ((0, 2, 3, 4, 6), (2, 4))


def test_a_list_is_needed(source: ModelSpec) -> None:
    with pytest.raises(RequestError, match=r"needs the layers to go.*scoring\.layers"):
        score_locally(ScoreSpec(model=ModelRef(source), calibration=TEXT, criterion="fixed"))


@pytest.mark.parametrize("criterion", sorted({*PLAIN, "perplexity"} - {*RUNS}))
def test_protected_layers_are_scored_and_never_chosen(source: ModelSpec, criterion: str) -> None:
    """The order is that without protection, those layers taken out of it."""
    model = ModelRef(source, dropped=(3,))
    free = ScoreSpec(model=model, calibration=TEXT, criterion=criterion, max_sequences=3)
    shielded = ScoreSpec(
        model=model, calibration=TEXT, criterion=criterion, max_sequences=3, protected=(0, 2, 6)
    )
    want, got = score_locally(free), score_locally(shielded)
    assert (got.source_layers, got.scores) == (want.source_layers, want.scores)
    assert got.removal_order == tuple(layer for layer in want.removal_order if layer not in (0, 2, 6))


@pytest.mark.parametrize("criterion", RUNS)
def test_a_run_keeps_clear_of_protected_layers(source: ModelSpec, criterion: str) -> None:
    spec = ScoreSpec(
        model=ModelRef(source), calibration=TEXT, criterion=criterion, num_remove=2, protected=(0, 3, 6)
    )
    result = score_locally(spec)
    starts = {1: (1, 2), 4: (4, 5)}  # the only runs of two
    best = min(starts, key=lambda start: result.scores[start])
    assert result.removal_order[:2] == starts[best]
    assert set(result.removal_order) == {1, 2, 4, 5}


@pytest.mark.parametrize("screen_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("eliminate", [False, True])
def test_giving_up_and_screening_choose_among_the_others(
    source: ModelSpec, eliminate: bool, screen_dtype: str | None
) -> None:
    plain = score_locally(ScoreSpec(model=ModelRef(source), calibration=TEXT))
    protected = plain.removal_order[:2]
    spec = ScoreSpec(
        model=ModelRef(source),
        calibration=TEXT,
        num_remove=2,
        protected=tuple(sorted(protected)),
        eliminate=eliminate,
        screen_dtype=screen_dtype,  # type: ignore[arg-type]
    )
    assert score_locally(spec).removal_order[:2] == plain.removal_order[2:4]


def test_protected_layers_may_leave_no_run() -> None:
    with pytest.raises(RequestError, match=r"scoring\.protected leaves no 2 layers in a row"):
        removal_order([1.0, 2.0, 3.0, 4.0], highest_first=True, run=2, protected=(1, 3))
