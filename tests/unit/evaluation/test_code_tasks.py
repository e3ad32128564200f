"""Code that lm-eval's tasks collect: classified always, run only if that is allowed."""

import json
from pathlib import Path

import pytest
import yaml

from actors.evaluation import evaluate_tasks
from actors.evaluation.code_failures import CLASSES
from actors.evaluation.code_tasks import code_task_metrics, is_code_problem
from tests.tiny_models import tiny_llama

ADD = {
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(f): assert f(1, 2) == 3",
}
TWICE = {"prompt": "Double a number.", "test_list": ["assert twice(2) == 4"]}


def _logged(document: dict[str, object], *responses: str) -> list[dict[str, object]]:
    return [{"doc": document, "filtered_resps": [[response]]} for response in responses]


def test_shares_of_classes_and_of_what_passes() -> None:
    samples = {
        "add": _logged(
            ADD, "    return a + b\n", "    return a - b\n", "    return (a + b\n", "    return c\n"
        ),
        "twice": _logged(TWICE, "def twice(x): return 2 * x", "def twice(x: return"),
        "copa": [{"doc": {"premise": "x"}, "filtered_resps": [(-1.0, True)]}],
    }
    values = {m.name: m.value for m in code_task_metrics(samples, execute=True)}
    assert values == {
        "add/malformed_fences": 0, "add/unbalanced_parentheses": 0.25, "add/undefined_names": 0.25,
        "add/other_syntax": 0, "add/clean": 0.5, "add/pass_at_1": 0.25,
        "twice/malformed_fences": 0, "twice/unbalanced_parentheses": 0.5, "twice/undefined_names": 0,
        "twice/other_syntax": 0, "twice/clean": 0.5, "twice/pass_at_1": 0.5,
    }  # fmt: skip


def test_without_leave_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.evaluation.sandbox.subprocess.Popen", lambda *_, **__: pytest.fail("ran"))
    metrics = code_task_metrics({"add": _logged(ADD, "    return a + b\n")}, execute=False)
    assert [m.name for m in metrics] == [f"add/{name}" for name in CLASSES]


def test_code_problems_are_known_by_their_fields() -> None:
    assert is_code_problem(ADD)
    assert is_code_problem(TWICE)
    assert not is_code_problem({"prompt": "x", "test": "y"})
    assert not is_code_problem("text")


def test_generated_code_of_a_task_is_classified_and_run_if_allowed(tmp_path: Path) -> None:
    """HumanEval's and MBPP's forms, as tasks that only collect what the model writes."""
    humaneval = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): assert f() is None"}
    mbpp = {"prompt": "Write a function.", "test_list": ["assert True"]}
    for name, document in (("he", humaneval), ("mb", mbpp)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text(json.dumps(document) + "\n")
        settings = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "",
            "metric_list": [{"metric": "bypass"}],
            "generation_kwargs": {"max_gen_toks": 4, "do_sample": False},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    model, tokenizer = tiny_llama()
    asked = {"include_path": str(tmp_path), "batch_size": 1}
    for allowed in (False, True):
        metrics, _ = evaluate_tasks(model, tokenizer, ["he", "mb"], **asked, allow_code_execution=allowed)
        names = [*CLASSES, "pass_at_1"] if allowed else list(CLASSES)
        assert {m.name for m in metrics} == {f"{task}/{name}" for task in ("he", "mb") for name in names}
        for task in ("he", "mb"):
            assert sum(m.value for m in metrics if m.name in {f"{task}/{name}" for name in CLASSES}) == 1
