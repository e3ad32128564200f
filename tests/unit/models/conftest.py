"""What the tests of models share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep converted models and file hashes of these tests out of the user's cache."""
    monkeypatch.setenv("ITERABRE_CACHE", str(session_cache))
