"""Generation on real Ray actors: any number of them, and one that is killed, give the same file."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from actors.contracts import ActorPoolSpec, GenerationSpec, ModelSpec, TextSpec
from actors.errors import RequestError
from actors.generation import generate_locally, responses
from actors.generation import ray as actor
from actors.generation.ray import GenerateActor, generate_on_ray
from actors.generation.responses import Response, Shard
from tests.support.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("ray_two_cpus")


@pytest.fixture
def spec(tmp_path: Path) -> GenerationSpec:
    rows = [json.dumps({"q": f"Who is number {i} ?"}) for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    prompts = TextSpec(path=str(tmp_path / "prompts.jsonl"), prompt_column="q", chat_template="plain")
    model = ModelSpec(save_tiny(tmp_path / "model"))
    return GenerationSpec(
        model=model, prompts=prompts, responses_per_prompt=2, max_new_tokens=4, temperature=1.0
    )


def test_a_pool_that_loses_an_actor_gives_what_one_process_does(
    spec: GenerationSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.touch()

    class Mortal(GenerateActor):
        def work(self, shard: Shard) -> list[Response]:
            with log.open("a") as file:
                file.write(f"{shard.first}\n")
            if len(log.read_text().splitlines()) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().work(shard)

    monkeypatch.setitem(responses.PROMPTS_PER_SHARD, "transformers", 3)
    monkeypatch.setattr(actor, "GenerateActor", Mortal)
    here = generate_locally(spec, str(tmp_path / "here"))
    there = generate_on_ray(spec, str(tmp_path / "there"), ActorPoolSpec(2, cpus=0.4, gpus=0))
    assert there.artifact.sha256 == here.artifact.sha256
    assert replace(there, artifact=here.artifact) == here
    begun = log.read_text().split()
    assert len(begun) == 5
    assert set(begun) == {"0", "3", "6", "9"}


def test_what_is_wrong_is_reported_not_that_an_actor_died(spec: GenerationSpec, tmp_path: Path) -> None:
    bare = replace(spec, prompts=replace(spec.prompts, chat_template=None))
    with pytest.raises(RequestError, match="has no chat template"):
        generate_on_ray(bare, str(tmp_path / "out"), ActorPoolSpec(1, cpus=0.4, gpus=0))
