"""The card of an exported model, as the hub reads it, and its upload."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard, constants

from actors.contracts import ModelSpec, Origin
from actors.models.loading.licence import origin
from orchestrator.errors import RequestError, WorkError
from orchestrator.export.hub import upload
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre

WHICH = ("--trajectory", "llama--iterabre--seed0", "--iteration", 1)
README = "---\nlicense: other\nlicense_name: fox\nlicense_link: LICENSE\nbase_model: den/fox\n---\n# Fox\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model that says under which licence it comes."""
    directory = tmp_path_factory.mktemp("published")
    campaign = tiny_campaign(directory)
    (directory / "model/README.md").write_text(README)
    (directory / "model/LICENSE").write_text("Foxes only.")
    campaign["targets"] = [{"layers": 3}]
    text = {"name": "wikitext2", "data": {"builtin": "wikitext-2-raw-test"}, "context": 32, "max_tokens": 256}
    campaign["evaluation"]["perplexity"].append(text)
    answer = iterabre("compress", write_campaign(campaign, directory / "tiny.yaml"))
    assert answer.exit_code == 0, answer.err
    return directory


def test_the_hub_reads_the_card(place: Path) -> None:
    exported = next((place / "runs/tiny/models").glob("*/3-layers"))
    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "fox", "LICENSE")
    assert (data.base_model, data.base_model_relation) == ("den/fox", "finetune")
    assert (data.pipeline_tag, data.library_name) == ("text-generation", "transformers")
    scores = json.loads((exported / "iterabre.json").read_text())["scores"]
    results = {f"{r.dataset_name}/{r.metric_name}": r.metric_value for r in data.eval_results}
    assert {r.dataset_type for r in data.eval_results} == {"Salesforce/wikitext"}
    assert results == {name: value for name, value in scores.items() if name.startswith("wikitext2/")}
    assert "fox/token_perplexity" in scores
    assert f'from_pretrained("{exported.name}")' in (exported / "README.md").read_text()
    assert (exported / "LICENSE").read_text() == "Foxes only."


@pytest.mark.parametrize(
    ("name", "text", "reported"),
    [
        ("README.md", README, Origin("den/fox", "other", "fox", "LICENSE")),
        ("LICENSE", "   Apache License\n  Version 2.0", Origin(None, "apache-2.0")),
        ("LICENSE.txt", "Foxes only.", Origin(None, "other", "license", "LICENSE.txt")),
        ("README.md", "# No metadata", Origin()),
        ("README.md", "---\n{wrong\n---\n", Origin()),
    ],
)
def test_what_a_directory_says_of_its_licence(tmp_path: Path, name: str, text: str, reported: Origin) -> None:
    (tmp_path / name).write_text(text)
    assert origin(ModelSpec(str(tmp_path))) == reported


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    repos: ClassVar[dict[str, bool]] = {}
    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        repo = self.path.split("?")[0].removeprefix("/api/models/").removesuffix("/revision/main")
        known = repo in self.repos
        self._answer({"id": repo, "private": self.repos[repo]} if known else {}, 200 if known else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_fox":
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            exists = repo in self.repos
            self.repos.setdefault(repo, asked.get("private", asked.get("visibility") == "private"))
            return self._answer({"url": f"http://{self.headers['Host']}/{repo}"}, 409 if exists else 200)
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._answer({"files": modes})
        if "/commit/" in self.path:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            oid = "0" * 40
            return self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/den/new/commit/{oid}", "commitOid": oid}
            )
        return self._answer({})

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A hub of this machine, with a public repository in it; what HF_ENDPOINT and HF_TOKEN would set."""
    monkeypatch.setattr(_Hub, "repos", {"den/seen": False})
    monkeypatch.setattr(_Hub, "files", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_fox")
    yield _Hub
    server.shutdown()


def test_export_uploads_privately(place: Path, hub: type[_Hub], tmp_path: Path) -> None:
    output = tmp_path / "out"
    answer = iterabre("export", place / "runs/tiny", *WHICH, "--output", output, "--push-to-hub", "den/new")
    assert answer.exit_code == 0, answer.err
    assert hub.repos["den/new"] is True
    names = ("README.md", "LICENSE", "iterabre.json", "model.safetensors")
    assert all(hub.files[name] == (output / name).read_bytes() for name in names)
    assert 'from_pretrained("den/new")' in (output / "README.md").read_text()
    assert str(place) not in (output / "README.md").read_text()


def test_a_public_repository_is_not_taken_for_a_private_one(hub: type[_Hub], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    with pytest.raises(RequestError, match="there already and public; add --public"):
        upload(tmp_path, "den/seen")
    assert not hub.files
    upload(tmp_path, "den/seen", public=True)
    assert set(hub.files) == {"README.md"}


def test_a_refusal_is_reported(hub: type[_Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wolf")
    with pytest.raises(WorkError, match=r"did not take 'den/new': .*try again with `hf upload"):
        upload(tmp_path, "den/new")


@pytest.mark.parametrize(
    ("repo", "message"), [("den/new", "set HF_TOKEN"), ("new", "USER/new"), ("a b/c", "no repository")]
)
def test_nothing_is_written_where_no_upload_is_possible(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str, message: str
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    output = tmp_path / "out"
    answer = iterabre("export", place / "runs/tiny", *WHICH, "--output", output, "--push-to-hub", repo)
    assert answer.exit_code == 2
    assert message in answer.err
    assert not output.exists()
