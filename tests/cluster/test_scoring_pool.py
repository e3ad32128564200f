"""Scoring on real Ray actors: any number of them gives the same scores, and so does losing one."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.contracts import ActorPoolSpec, MergeSpec, ModelRef, ModelSpec, ScoreResult, ScoreSpec, TextSpec
from actors.errors import UnexpectedError, WorkError
from actors.ray_pool import ActorPool
from actors.scoring import ray as actor
from actors.scoring import score_locally
from actors.scoring.ray import ScoreActor, score_on_pool, score_on_ray
from actors.scoring.score import Shard, ShardScores
from tests.support.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("ray_two_cpus")
LONG = pytest.mark.long

MERGES = MergeSpec(group=2, threshold=-1.0)
BY_HAND = {"criterion": "fixed", "layers": (4, 2)}
LINES = [f"The gods of the land number {i} give rise to way " + "higher " * i for i in range(9)]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ScoreSpec:
    """Nine sequences of nine lengths, a model of six layers."""
    directory = tmp_path_factory.mktemp("pool")
    (directory / "calibration.txt").write_text("\n".join(LINES))
    path = save_tiny(directory / "model", num_layers=6)
    return ScoreSpec(
        model=ModelRef(ModelSpec(path)), calibration=TextSpec(path=str(directory / "calibration.txt"))
    )


@pytest.fixture(scope="module")
def local(spec: ScoreSpec) -> ScoreResult:
    return score_locally(spec)


def on_ray(
    spec: ScoreSpec, actors: int, progress: Callable[[int, int, str], None] | None = None
) -> ScoreResult:
    options: dict[str, Any] = {"progress": progress} if progress else {}
    return score_on_pool(spec, ActorPoolSpec(actors, cpus=0.4, gpus=0), **options)


def recorder(log: Path, die: Callable[[Shard, int], bool]) -> type[ScoreActor]:
    """A score actor that writes down each shard it begins, and kills its own process where `die` says so."""

    class Recorder(ScoreActor):
        def work(self, shard: Shard) -> ShardScores:
            with log.open("a") as file:
                file.write(f"{shard.positions}\n")
            begun = len(log.read_text().splitlines())
            answer = super().work(shard)
            if die(shard, begun):
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

    return Recorder


def assert_same(got: ScoreResult, want: ScoreResult) -> None:
    assert got.scores == pytest.approx(want.scores, abs=1e-5)
    assert replace(got, scores=()) == replace(want, scores=())


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_any_number_of_actors_gives_the_same(spec: ScoreSpec, local: ScoreResult, actors: int) -> None:
    heard: list[int] = []
    result = on_ray(spec, actors, lambda done, total, _note: heard.append(done))
    assert_same(result, local)
    assert heard[-1] == 9


class Written:
    """A progress that writes down its reports, and kills the process of the first."""

    def __init__(self, file: Path):
        self._file = file

    def __call__(self, done: int, total: int, note: str = "") -> None:
        first = not self._file.exists()
        with self._file.open("a") as file:
            file.write(f"{done} of {total} {note}\n")
        if first:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("changes", "actors"),
    [({}, 1), ({"criterion": "laco", "num_remove": 1, "merge": MERGES}, 2), (BY_HAND, 2)],
    ids=["whole", "merges", "by hand"],
)
def test_one_actor_scores_all_that_is_not_divided(
    spec: ScoreSpec, changes: dict[str, Any], actors: int, tmp_path: Path
) -> None:
    alone, written = replace(spec, **changes), Written(tmp_path / "progress")
    result = score_on_ray(alone, ActorPoolSpec(actors, cpus=0.4, gpus=0), written)
    assert_same(result, score_locally(alone))
    if not changes:  # once by the process that was lost, once by the next
        assert (tmp_path / "progress").read_text() == "9 of 9 sequences\n" * 2


def test_more_actors_than_sequences_shard_the_candidates(spec: ScoreSpec) -> None:
    few = replace(spec, max_sequences=2)
    got, want = on_ray(few, 4), score_locally(few)
    assert got.scores == pytest.approx(want.scores, abs=1e-5)
    assert got.removal_order == want.removal_order


@pytest.mark.parametrize("actors", [2, pytest.param(4, marks=LONG)])
def test_rounds_of_bounds_are_those_of_one_process(spec: ScoreSpec, actors: int) -> None:
    bounded = replace(spec, eliminate=True, screen_dtype="bfloat16")
    heard: list[int] = []
    got = on_ray(bounded, actors, lambda done, _total, _note: heard.append(done))
    want = score_locally(bounded)
    assert got.removal_order[0] == want.removal_order[0] == score_locally(spec).removal_order[0]
    assert got.kinds == want.kinds
    assert got.scores == pytest.approx(want.scores, abs=1e-3)
    assert heard[-1] == 9


@pytest.mark.parametrize("actors", [pytest.param(1, marks=LONG), 2, pytest.param(3, marks=LONG)])
def test_an_actor_killed_in_mid_score_costs_its_shard_alone(
    spec: ScoreSpec, local: ScoreResult, actors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(actor, "ScoreActor", recorder(log, lambda _shard, begun: begun == 3))
    assert_same(on_ray(spec, actors), local)
    begun = log.read_text().splitlines()
    shards = min(9, actors * actor.SHARDS_PER_ACTOR)
    assert len(begun) == shards + 1
    assert len(set(begun)) == shards


@LONG
def test_all_actors_lost_for_good_is_reported(
    spec: ScoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(actor, "ScoreActor", recorder(tmp_path / "log", lambda _shard, _begun: True))
    with pytest.raises(WorkError, match=r"all 2 scoring actors were lost; .*--resume"):
        on_ray(spec, 2)


@LONG
def test_a_lost_node_costs_its_shard_alone(spec: ScoreSpec) -> None:
    """In a process of its own, with two nodes of its own."""
    model, text = spec.model.source.path, spec.calibration.path
    command = [sys.executable, "-m", "tests.cluster.lose_a_node", model, str(text)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # Ray's own processes may write to the same output, before and after.
    lines = done.stdout.splitlines()
    found, forwards = (next(x for x in lines if x.startswith(start)) for start in ("nodes lost", "forwards"))
    assert found.startswith("nodes lost: 1 same order: True apart: ")
    assert float(found.rpartition(" ")[2]) < 1e-5
    assert len(set(forwards.split()[1:])) == 1


class Odd(Exception):
    """An exception that cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("no such thing")


class FailingActor:
    """Fails when it is made, or at work."""

    def __init__(self, when: str, log: str):
        self._log = Path(log)
        if when == "made":
            raise ValueError("cannot be made")

    def work(self, _shard: int) -> None:
        with self._log.open("a") as file:
            file.write("worked\n")
        raise Odd("it is odd")


@pytest.mark.parametrize(
    ("when", "said", "times"),
    [
        ("made", r"an actor could not start: ValueError: cannot be made: this is a fault", 0),
        ("at work", r"Odd: it is odd: this is a fault", 1),
    ],
)
def test_an_error_of_an_actor_is_met_once(tmp_path: Path, when: str, said: str, times: int) -> None:
    log = tmp_path / "log"
    log.touch()
    spec = ActorPoolSpec(1, cpus=0.4, gpus=0)
    with (
        pytest.raises(UnexpectedError, match=said),
        ActorPool(spec, FailingActor, when, str(log), setting="scoring") as pool,
    ):
        list(pool.dispatch(range(3)))
    assert len(log.read_text().splitlines()) == times
