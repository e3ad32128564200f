"""Downloads share a bounded space; what is in use stays."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from actors import artifacts
from actors.artifacts import node_cache, publish
from actors.artifacts.node_cache import CachedArtifact, expendable, limit_bytes
from actors.contracts import ArtifactRef
from actors.errors import RequestError
from tests.support.object_store import loopback_s3

CACHED = [CachedArtifact("new", 40, 30.0), CachedArtifact("old", 50, 10.0), CachedArtifact("mid", 60, 20.0)]


@pytest.mark.parametrize(
    ("needed", "limit", "free", "gone"),
    [
        (10, 160, 1000, []),
        (11, 160, 1000, ["old"]),
        (60, 160, 1000, ["old"]),
        (61, 160, 1000, ["old", "mid"]),
        (999, 160, 10_000, ["old", "mid", "new"]),
        (30, 1000, 20, ["old"]),
    ],
)
def test_the_least_recently_used_goes_first(needed: int, limit: int, free: int, gone: list[str]) -> None:
    assert expendable(CACHED, needed, limit, free) == gone


def test_what_is_in_use_is_passed_over() -> None:
    used = [replace(each, in_use=each.name == "old") for each in CACHED]
    assert expendable(used, 11, 160, 1000) == ["mid"]


def test_the_limit_is_a_share_of_the_disk_or_what_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_bytes(1000) == 500
    monkeypatch.setenv("ITERABRE_CACHE_GB", "1.5")
    assert limit_bytes(1000) == 1_500_000_000
    monkeypatch.setenv("ITERABRE_CACHE_GB", "much")
    with pytest.raises(RequestError, match="ITERABRE_CACHE_GB='much' is no number of GB"):
        limit_bytes(1000)


FETCH = """
import sys
from actors.artifacts import fetch
from actors.contracts import ArtifactRef, FileRef
name, size, sha = sys.argv[2:]
fetch(ArtifactRef(sys.argv[1], (FileRef(name, int(size), sha),)))
print("fetched", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ITERABRE_CACHE_GB", "0.0025")
    with loopback_s3(monkeypatch) as uri:
        yield uri


def _holder(ref: ArtifactRef) -> "subprocess.Popen[str]":
    """A process that has fetched an artifact and uses it until its input ends."""
    (file,) = ref.files
    arguments = [ref.uri, file.name, str(file.size_bytes), file.sha256]
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "fetched\n"
    return process


def test_downloads_are_evicted_but_not_what_a_process_uses(bucket: str, tmp_path: Path) -> None:
    refs = []
    for number in range(4):
        source = tmp_path / f"source-{number}"
        source.mkdir()
        (source / "weights").write_bytes(os.urandom(1_000_000))
        refs.append(publish(source, f"{bucket}/{number}"))

    def there() -> list[int]:
        root = artifacts.cache_dir() / node_cache.ARTIFACTS
        return [number for number, ref in enumerate(refs) if (root / ref.sha256).is_dir()]

    user = _holder(refs[0])
    _holder(refs[1]).communicate()
    assert there() == [0, 1]
    _holder(refs[2]).communicate()
    assert there() == [0, 2], "the first is older, and in use"
    user.communicate()
    _holder(refs[3]).communicate()
    assert there() == [2, 3]
