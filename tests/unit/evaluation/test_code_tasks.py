"""Code that lm-eval's tasks collect: classified always, run only if that is allowed."""

import json
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.tasks._yaml_loader import load_yaml

from actors.evaluation import check_tasks, evaluate_tasks
from actors.evaluation.lm_eval.task_loading import TASKS, load_tasks
from actors.evaluation.probes.code_failures import CLASSES
from actors.evaluation.probes.code_tasks import code_task_metrics, is_code_problem
from tests.support.tiny_models import tiny_llama

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
        "add/other_syntax": 0, "add/clean": 0.5, "add/cut_off": 0, "add/pass_at_1": 0.25,
        "twice/malformed_fences": 0, "twice/unbalanced_parentheses": 0.5, "twice/undefined_names": 0,
        "twice/other_syntax": 0, "twice/clean": 0.5, "twice/cut_off": 0, "twice/pass_at_1": 0.5,
    }  # fmt: skip


def test_without_leave_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "actors.evaluation.sandbox.runner.subprocess.Popen", lambda *_, **__: pytest.fail("ran")
    )
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


CODE = {"humaneval_plus": "    return a + b\n", "mbpp_plus": "def add_0(x):\n    return x\n"}
PLUS = {
    "humaneval_plus": [ADD],
    "mbpp_plus": [
        {
            "prompt": f"Add {i} to a number.",
            "code": f"def add_{i}(x):\n    return x + {i}",
            "test_list": [f"assert add_{i}(0) == {i}", f"assert add_{i}(1) == {i + 1}", "assert True"],
            "test": f"assert add_{i}(2) == {i + 2}",
        }
        for i in range(5)
    ],
}


@pytest.mark.parametrize("task", PLUS)
def test_our_code_tasks_ask_as_lm_eval_does_and_read_local_data(task: str, tmp_path: Path) -> None:
    """A task of the user's own with the same name and another data set takes the place of ours."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in PLUS[task]))
    local = {
        "include": str(TASKS / f"{task}.yaml"),
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
    }
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(local))
    check_tasks([task], str(tmp_path))
    loaded = load_tasks((task,), str(tmp_path), None)["tasks"][task]
    loaded.build_all_requests(limit=1)
    (asked, _), first = loaded.instances[0].args, PLUS[task][0]
    question = loaded.doc_to_text(first)
    assert asked.endswith(question)
    solved = [d for d in PLUS[task] if d != first][:3]
    shots = [f"{loaded.doc_to_text(d)}{d['code']}\n[DONE]\n\n" for d in solved]
    assert asked == "".join(shots) + question
    values = {m.name: m.value for m in code_task_metrics({task: _logged(first, CODE[task])}, execute=True)}
    assert values[f"{task}/pass_at_1"] == 1


def test_our_code_tasks_hold_the_official_prompts() -> None:
    official = Path(lm_eval.__file__).parent / "tasks"
    same = {
        "humaneval_plus": ("humaneval/humaneval_plus", "num_fewshot dataset_path"),
        "mbpp_plus": ("mbpp/mbpp_plus", "num_fewshot dataset_path"),
        "humaneval_plus_instruct": ("humaneval/humaneval_instruct", "num_fewshot gen_prefix"),
        "mbpp_plus_instruct": ("mbpp/mbpp_plus_instruct", "num_fewshot gen_prefix dataset_path"),
    }
    for task, (file, settings) in same.items():
        ours = load_yaml(TASKS / f"{task}.yaml", resolve_func=False)
        theirs = load_yaml(official / f"{file}.yaml", resolve_func=False)
        asked = theirs["doc_to_text"].replace("prompt if prompt is defined else text", "prompt")
        assert ours["doc_to_text"] == asked
        for setting in ("test_split", "generation_kwargs", *settings.split()):
            assert ours[setting] == theirs[setting], setting


INSTRUCT = {
    "humaneval_plus_instruct": {
        "    return a + b\n```\nThis adds them.": ("clean", 1),
        "    return a + b\n": ("clean", 1),
        "    return (a + b\n```": ("unbalanced_parentheses", 0),
        "    return a - b\n```": ("clean", 0),
    },
    "mbpp_plus_instruct": {
        "def add_0(x):\n    return x\n```\nThis adds 0:\n```\nadd_0(1)\n```\n": ("clean", 1),
        "def add_0(x):\n    return x\n": ("malformed_fences", 0),
        "def add_0(x):\n    return y\n```\n": ("undefined_names", 0),
    },
}


@pytest.mark.parametrize("task", INSTRUCT)
def test_answers_within_a_block_that_the_prompt_has_begun(task: str, tmp_path: Path) -> None:
    document = PLUS[task.removesuffix("_instruct")][0]
    (tmp_path / "data.jsonl").write_text(json.dumps(document) + "\n")
    local = {
        "include": str(TASKS / f"{task}.yaml"),
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
    }
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(local))

    def chat(turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)

    loaded = load_tasks((task,), str(tmp_path), None)["tasks"][task]
    for answer, (expected, passes) in INSTRUCT[task].items():
        loaded.build_all_requests(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=chat)
        (instance,) = loaded.instances
        user, _, begun = instance.args[0].partition("<assistant>")
        assert user.startswith("<user>")
        assert "```python\n" in begun
        instance.resps = [answer]
        loaded.apply_filters()
        (filtered,) = instance.filtered_resps.values()
        logged = [{"doc": document, "filtered_resps": [filtered]}]
        values = {m.name: m.value for m in code_task_metrics({task: logged}, execute=True)}
        assert (values[f"{task}/{expected}"], values[f"{task}/pass_at_1"]) == (1, passes), answer
