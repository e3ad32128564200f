"""Teaching on real Ray actors: any number of them, and one that is killed, store what one process does."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.contracts import ActorPoolSpec, FileRef, ModelSpec, TeachSpec, TextSpec
from actors.errors import RequestError
from actors.teaching import ray as actor
from actors.teaching import shards, teach_locally
from actors.teaching.ray import TeachActor, teach_on_ray
from actors.teaching.shards import Shard
from tests.support.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("ray_two_cpus")


@pytest.fixture
def spec(tmp_path: Path) -> TeachSpec:
    (tmp_path / "text.txt").write_text("\n".join(f"{i} The lazy dog ." for i in range(60)))
    model = ModelSpec(save_tiny(tmp_path / "model"))
    return TeachSpec(model=model, data=TextSpec(path=str(tmp_path / "text.txt")), sequence_length=16)


def test_a_pool_that_loses_an_actor_stores_what_one_process_does(
    spec: TeachSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.touch()

    class Mortal(TeachActor):
        def work(self, shard: Shard) -> FileRef:
            with log.open("a") as file:
                file.write(f"{shard.number}\n")
            if len(log.read_text().splitlines()) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().work(shard)

    monkeypatch.setattr(shards, "SHARD_TOKENS", 160)
    monkeypatch.setattr(actor, "TeachActor", Mortal)
    here = teach_locally(spec, str(tmp_path / "here"))
    there = teach_on_ray(spec, str(tmp_path / "there"), ActorPoolSpec(2, cpus=0.4, gpus=0))
    assert replace(there, artifact=here.artifact) == here
    assert [file.name for file in there.artifact.files] == [file.name for file in here.artifact.files]
    for file in here.artifact.files[1:]:
        theirs = load_file(tmp_path / "there" / file.name)
        for name, value in load_file(tmp_path / "here" / file.name).items():
            torch.testing.assert_close(value, theirs[name])
    begun = log.read_text().split()
    assert len(begun) == len({*begun}) + 1 == len(here.artifact.files)


def test_what_is_wrong_is_reported_not_that_an_actor_died(spec: TeachSpec, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="teacher_cache_blocks has 40"):
        teach_on_ray(replace(spec, entering=(40,)), str(tmp_path / "out"), ActorPoolSpec(1, cpus=0.4, gpus=0))
