"""Engines besides transformers: a served model, and vLLM in a stand-in of its interface."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import ray

from actors.contracts import GenerationSettings, GenerationSpec, ModelSpec, TextSpec
from actors.errors import RequestError, WorkError
from actors.generation import generate_locally
from actors.generation.responses import FILE
from actors.generation.vllm import PACKAGES
from tests.support.tiny_models import save_tiny, tiny_tokenizer

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"


@pytest.fixture
def spec(tmp_path: Path) -> GenerationSpec:
    (tmp_path / "chat.jinja").write_text(CHAT)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"q": f"Number {i} ?"}) + "\n" for i in range(30)))
    text = TextSpec(path=str(path), prompt_column="q", chat_template=str(tmp_path / "chat.jinja"))
    return GenerationSpec(
        model=ModelSpec(save_tiny(tmp_path / "model")),
        prompts=text,
        max_new_tokens=5,
        temperature=0.5,
        responses_per_prompt=3,
        batch_size=4,
    )


class Server(ThreadingHTTPServer):
    """Answers a prompt with itself; `most` choices a request, whatever `n` says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.most = 8
        self.key: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "dense"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.key = self.headers.get("Authorization")
        text = tiny_tokenizer().decode(request["prompt"])
        choice = {"text": f" {text}", "finish_reason": "stop"}
        self.answer({"choices": [choice] * min(request["n"], self.server.most)})

    def answer(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def served(spec: GenerationSpec, server: Server) -> GenerationSpec:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return replace(spec, engine="openai", base_url=url, served_model="dense")


@pytest.mark.parametrize("most", [8, 1])
def test_a_served_model_reads_the_tokens_of_each_prompt(
    spec: GenerationSpec, server: Server, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.most = most
    result = generate_locally(served(spec, server), str(tmp_path / "out"))
    rows = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()]
    assert (result.num_prompts, result.num_responses, result.num_finished) == (30, 90, 90)
    assert [row["response"] for row in rows] == [f"user: Number {i // 3} ?" for i in range(90)]
    assert len(server.requests) == 30 * (3 if most == 1 else 1)
    assert {(r["temperature"], r["max_tokens"], r["model"]) for r in server.requests} == {(0.5, 5, "dense")}
    assert len({r["seed"] for r in server.requests}) == len(server.requests)
    assert server.key == "Bearer secret"


def test_a_server_that_lacks_the_model_or_is_not_there_is_reported(
    spec: GenerationSpec, server: Server, tmp_path: Path
) -> None:
    other = replace(served(spec, server), served_model=None)
    with pytest.raises(RequestError, match=r"does not serve .*model.*but: dense; set .*served_model"):
        generate_locally(other, str(tmp_path / "out"))
    away = replace(other, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(WorkError, match=r"127\.0\.0\.1:9/v1 gave no answer.*--resume"):
        generate_locally(away, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="needs base_url"):
        GenerationSettings(engine="openai")


def test_vllm_gets_all_prompts_in_one_call_as_tokens(
    spec: GenerationSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Any]] = []
    made: list[dict[str, Any]] = []

    class LLM:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))

        def __init__(self, **options: Any):
            made.append(options)

        def generate(self, prompts: Any, sampling: Any, use_tqdm: bool) -> list[Any]:
            calls.append((prompts, sampling))
            one = SimpleNamespace(text=" yes ", finish_reason="stop", token_ids=[1, 2])
            return [SimpleNamespace(outputs=[one] * 3) for _ in prompts]

    stand_in = ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    asked = replace(spec, engine="vllm", tensor_parallel_size=2, max_model_len=48)
    result = generate_locally(asked, str(tmp_path / "out"))
    assert (result.num_responses, result.num_tokens) == (90, 180)
    ((prompts, sampling),) = calls
    assert tiny_tokenizer().decode(prompts[7]["prompt_token_ids"]) == "user: Number 7 ? "
    assert len({each.seed for each in sampling}) == 30
    assert (made[0]["tensor_parallel_size"], made[0]["max_model_len"]) == (2, 48)


@pytest.mark.long
def test_the_environment_of_vllm_can_be_resolved(tmp_path: Path) -> None:
    """As Ray makes it, by uv: with the cluster's release of Ray, on its own, beside nothing of ours."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    (tmp_path / "requirements.in").write_text("\n".join([*PACKAGES, f"ray=={ray.__version__}"]))
    platform = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
    command = [uv, "pip", "compile", "--quiet", *platform, str(tmp_path / "requirements.in")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "vllm==" in done.stdout
    assert f"ray=={ray.__version__}" in done.stdout
