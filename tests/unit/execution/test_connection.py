"""What names a Ray cluster is understood or refused by name, and nothing waits for one that is not there."""

import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray._private.worker import _merge_runtime_env

from orchestrator.errors import RequestError
from orchestrator.execution import cluster as cluster_module
from orchestrator.execution.cluster import cluster, find_cluster
from orchestrator.execution.connection import (
    LEAST_OPEN_FILES,
    check_token_file,
    cluster_address,
    ray_temp_dir,
    unreachable,
    without_variables_of_job,
)
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre


@pytest.mark.parametrize(
    ("option", "variable", "meant"),
    [
        (None, None, "local"),
        (None, "", "local"),
        (None, "  ", "local"),
        ("", "", "local"),
        (None, "auto", "auto"),
        (None, "local", "local"),
        (None, " 127.0.0.1:6379\n", "127.0.0.1:6379"),
        ("auto", None, "auto"),
        ("auto", "head:6379", "head:6379"),
        ("local", "head:6379", "local"),
        ("other:6380", "head:6379", "other:6380"),
        ("other:6380", "http://127.0.0.1:8265", "other:6380"),
        ("[::1]:6379", None, "[::1]:6379"),
        ("ray-head.ns.svc.cluster.local:6379", None, "ray-head.ns.svc.cluster.local:6379"),
    ],
)
def test_usual_forms_are_understood(option: str | None, variable: str | None, meant: str) -> None:
    assert cluster_address(option, {} if variable is None else {"RAY_ADDRESS": variable}) == meant


def test_a_cluster_that_asks_for_a_token_is_named_as_such() -> None:
    reason = "RPC error: InvalidAuthToken: Authentication token is missing or incorrect."
    said = str(unreachable("head:6379", reason))
    assert "asks for a token" in said
    assert "RAY_AUTH_TOKEN_PATH=FILE" in said
    assert "ray start --head" in str(unreachable("head:6379", "connection refused"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://127.0.0.1:10001", "Ray Client"),
        ("http://127.0.0.1:8265", "dashboard.*ray job submit"),
        ("https://ray.example.org", "dashboard"),
        ("localhost", "no address of a Ray cluster"),
        ("127.0.0.1", "no address of a Ray cluster"),
        ("::1:6379", "no address"),
        ("head:", "no address"),
        ("head:port", "no address"),
        ("head:0", "no address"),
        ("head:70000", "no address"),
        ("anyscale://x", "no address"),
        ("two words", "no address"),
        ("6379", "no address"),
        ("AUTO", "no address"),
    ],
)
def test_others_are_refused_by_name(address: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"--address '{re.escape(address)}' .*{message}.*HOST:PORT"):
        cluster_address(address, {})
    with pytest.raises(RequestError, match=f"RAY_ADDRESS '{re.escape(address)}' .*unset RAY_ADDRESS"):
        cluster_address(None, {"RAY_ADDRESS": address})


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(RequestError) as refused:
        cluster_address("http://me:secret@host:8265", {})
    assert "secret" not in str(refused.value)


def test_where_nothing_listens_is_reported_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    before = time.monotonic()
    for dead in (address, "no-such-host.invalid:6379"):
        answer = iterabre("doctor", "--json", "--address", dead)
        (cluster,) = (each for each in json.loads(answer.out) if each["name"] == "Ray cluster")
        assert (answer.exit_code, cluster["state"]) == (1, "fail")
        assert dead in cluster["found"]
        assert "ray start --head" in cluster["remedy"]
    assert time.monotonic() - before < 60


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "speaks HTTP"])
def test_what_is_no_ray_head_is_reported_within_a_minute(silent: bool) -> None:
    with ExitStack() as stack:
        if silent:
            listening = stack.enter_context(socket.socket())
            listening.bind(("0.0.0.0", 0))
            listening.listen()
            port = listening.getsockname()[1]
        else:
            server = stack.enter_context(ThreadingHTTPServer(("0.0.0.0", 0), BaseHTTPRequestHandler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            port = server.server_port
        before = time.monotonic()
        with pytest.raises(RequestError, match=f"joined at 127.0.0.1:{port} .*what listens there is no Ray"):
            find_cluster(f"127.0.0.1:{port}")
    assert time.monotonic() - before < 40


def test_a_token_file_without_a_token_is_named(tmp_path: Path) -> None:
    """Ray ends the whole process, with a trace of its own, where it reads no token."""
    file = tmp_path / "token"
    asked = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    with pytest.raises(RequestError, match=f"RAY_AUTH_TOKEN_PATH '{file}' holds no token.*No such file"):
        check_token_file(asked)
    file.write_text("\n")
    with pytest.raises(RequestError, match="it is empty"):
        check_token_file(asked)
    check_token_file({**asked, "RAY_AUTH_MODE": "disabled"})
    check_token_file({**asked, "RAY_AUTH_TOKEN": "0" * 64})
    file.write_text("0" * 64)
    check_token_file(asked)


def test_rays_directory_is_below_that_of_the_user_while_sockets_fit(tmp_path: Path) -> None:
    assert ray_temp_dir({}) is None
    assert ray_temp_dir({"TMPDIR": "/tmp"}) == "/tmp/ray"
    assert ray_temp_dir({"TMPDIR": ""}) == "/tmp/ray"
    assert ray_temp_dir({"RAY_TMPDIR": "/tmp", "TMPDIR": "/nowhere"}) == "/tmp/ray"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_directory_too_long_or_with_spaces_is_replaced_by_a_short_one(
    tmp_path: Path, variable: str
) -> None:
    # As long as batch systems make them; in bytes, not letters.
    for name in ("slurm_jobdir/1355700/tmp.node0016/and/more/of/it", "ü" * 40, "a b"):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        chosen = ray_temp_dir({variable: str(directory)})
        assert chosen == f"/tmp/ray-{os.getuid()}"
        # A path that a real socket can be bound to.
        place = Path(chosen, "session_2026-11-28_12-09-47_818842_8274", "sockets")
        assert len(os.fsencode(place / "plasma_store")) <= 107


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path, variable: str) -> None:
    (tmp_path / "file").write_text("")
    for value in (f"{tmp_path}/nowhere", f"{tmp_path}/file"):
        with pytest.raises(RequestError, match=f"{variable} '{value}' is no directory that can be written"):
            ray_temp_dir({variable: value})


def test_too_few_open_files_are_refused_by_the_name_of_the_limit() -> None:
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({LEAST_OPEN_FILES - 1},) * 2)\n"
        "from orchestrator.execution.connection import check_open_files\n"
        "from orchestrator.errors import RequestError\n"
        "try: check_open_files()\n"
        "except RequestError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "(ulimit -n)" in done.stdout
    assert str(LEAST_OPEN_FILES - 1) in done.stdout
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= LEAST_OPEN_FILES


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RAY_ADDRESS": "http://127.0.0.1:8265"},
            "RAY_ADDRESS 'http://127.0.0.1:8265' is that of a dashboard",
        ),
        ({"RAY_ADDRESS": "ray://127.0.0.1:10001"}, "RAY_ADDRESS 'ray://127.0.0.1:10001' is Ray Client's"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "no Ray cluster can be joined at 127.0.0.1:1"),
        ({"RAY_ADDRESS": "", "TMPDIR": "/no/such/directory"}, "TMPDIR '/no/such/directory' is no directory"),
    ],
)
def test_a_campaign_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    raw = tiny_campaign(tmp_path)
    raw["execution"] = {"backend": "ray"}
    file = write_campaign(raw, tmp_path / "campaign.yaml")
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answer = iterabre("campaign", file)
    assert answer.exit_code == 2, answer.err
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "runs").exists()


def test_what_a_jobs_runtime_env_sets_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    of_job = {"env_vars": {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "true", "OTHER": "1"}}
    given: dict[str, str] = {}

    def init(runtime_env: dict[str, dict[str, str]], **_: object) -> None:
        """As `ray.init` of a driver that is a job."""
        merged = _merge_runtime_env(of_job, runtime_env, override=False)
        if merged is None:
            raise ValueError(f"Failed to merge the Job's runtime env {of_job} with {runtime_env}")
        given.update(merged["env_vars"])

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": of_job, "metadata": {}}))
    monkeypatch.setattr(cluster_module.ray, "init", init)
    monkeypatch.setattr(cluster_module.ray, "shutdown", lambda: None)
    with cluster("local"):
        assert given["TOKENIZERS_PARALLELISM"] == "true"
        assert given["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_a_job_that_sets_what_workers_need_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    ours = {"ITERABRE_DRIVER_DIRECTORY": "/a", "ITERABRE_PLUGINS": "{}", "TQDM_DISABLE": "1"}
    of_job = {"ITERABRE_DRIVER_DIRECTORY": "/b", "ITERABRE_PLUGINS": "{}", "TQDM_DISABLE": "0"}
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": of_job}})}
    caplog.set_level(logging.WARNING)
    assert without_variables_of_job(ours, job) == {}
    assert without_variables_of_job(ours, {}) == ours
    assert without_variables_of_job(ours, {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": null}'}) == ours
    (said,) = caplog.messages
    assert "ITERABRE_DRIVER_DIRECTORY to '/b', but workers need '/a'" in said
