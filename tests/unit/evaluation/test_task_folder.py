"""A folder of the user's own tasks is what it was when the run was planned, or is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from actors.contracts import EvaluationSpec, ModelRef, ModelSpec
from actors.errors import ChangedError
from actors.evaluation import tasks_fingerprint
from actors.evaluation.lm_eval.task_folder import check_tasks_unchanged


def test_a_folder_is_known_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a")
    seen = [tasks_fingerprint(str(tmp_path))]
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/functions.pyc").write_bytes(b"compiled")
    assert tasks_fingerprint(str(tmp_path)) == seen[0]
    (tmp_path / "a.yaml").write_text("task: b")
    seen.append(tasks_fingerprint(str(tmp_path)))
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
    seen.append(tasks_fingerprint(str(tmp_path)))
    assert len(set(seen)) == 3
    assert tasks_fingerprint(None) is None


def test_a_folder_that_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a")
    spec = EvaluationSpec(model=ModelRef(ModelSpec("m")), tasks=("a",), include_path=str(tmp_path))
    planned = replace(spec, tasks_fingerprint=tasks_fingerprint(str(tmp_path)))
    check_tasks_unchanged(planned)
    (tmp_path / "a.yaml").write_text("task: a\nmetadata: {version: 2}")
    check_tasks_unchanged(spec)
    check_tasks_unchanged(replace(planned, tasks=()))
    with pytest.raises(ChangedError, match=f"{tmp_path}.*{str(planned.tasks_fingerprint)[:12]}"):
        check_tasks_unchanged(planned)
