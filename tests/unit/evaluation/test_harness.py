"""lm-eval through our call against lm-eval's own `simple_evaluate`; our tasks against the official ones."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from actors.data import builtin_file
from actors.errors import RequestError
from actors.evaluation import check_tasks, evaluate_tasks
from actors.evaluation.lm_eval.harness import evaluate_tasks_with
from actors.evaluation.lm_eval.language_models import PrefixTreeLM, local_responder
from actors.evaluation.lm_eval.samples import write_samples
from actors.evaluation.lm_eval.task_loading import TASKS
from tests.support.tiny_models import save_tiny, tiny_llama

FEWSHOT_TASK = """
task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""
GROUP = """
group: tiny_group
task: [blimp_sample, tiny_words]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def user_tasks(tmp_path: Path) -> Path:
    """A folder of the user's own tasks: bootstrapped stderr, a named filter, few-shot examples, a group."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"The lazy dog {i}", "answer": f"jumps {i * i}"} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fill = {"data": data, "kind": "loglikelihood"}
    words = FEWSHOT_TASK.format(name="words", metric="acc", aggregation="mean", **fill)
    odds = FEWSHOT_TASK.format(name="odds", metric="perplexity", aggregation="perplexity", **fill)
    filtered = "filter_list: [{name: first, filter: [{function: take_first}]}]\n"
    (tmp_path / "words.yaml").write_text(words)
    (tmp_path / "odds.yaml").write_text(odds + filtered)
    (tmp_path / "group.yaml").write_text(GROUP)
    return tmp_path


def stock(tasks: list[str], include_path: Path, **settings: object) -> dict[str, dict[str, float]]:
    model, tokenizer = tiny_llama()
    manager = TaskManager(include_path=[str(TASKS), str(include_path)], include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, **settings)["results"]


def test_numbers_are_those_of_lm_eval(user_tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_llama()
    tokenizer.pad_token = None
    evaluate_tasks(model, tokenizer, ["tiny_words"], include_path=str(user_tasks), num_fewshot=3, seed=5)
    tasks = ["tiny_words", "tiny_odds", "blimp_sample"]
    metrics, versions = evaluate_tasks(
        model, tokenizer, tasks, include_path=str(user_tasks), limit=10, num_fewshot=2, batch_size=4
    )
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert tokenizer.pad_token is None
    expected = stock(tasks, user_tasks, limit=10, num_fewshot=2)
    words, odds, blimp = (expected[task] for task in tasks)
    found = {metric.name: (metric.value, metric.stderr) for metric in metrics}
    assert found == {
        "tiny_words/acc": (words["acc,none"], words["acc_stderr,none"]),
        "tiny_odds/perplexity,first": pytest.approx(
            (odds["perplexity,first"], odds["perplexity_stderr,first"]), rel=1e-5
        ),
        "blimp_sample/acc": (blimp["acc,none"], blimp["acc_stderr,none"]),
    }
    assert dict(versions) == {
        "lm_eval": lm_eval.__version__,
        "task:blimp_sample": "1.1",
        "task:tiny_odds": "3.0",
        "task:tiny_words": "3.0",
    }


def test_a_model_measured_on_the_same_data_again_has_the_same_numbers(user_tasks: Path) -> None:
    settings = {"include_path": str(user_tasks), "num_fewshot": 2}
    first = evaluate_tasks(*tiny_llama(), ["tiny_odds"], **settings)
    assert evaluate_tasks(*tiny_llama(seed=1), ["tiny_odds"], **settings)[0] != first[0]
    (user_tasks / "data.jsonl").unlink()
    assert evaluate_tasks(*tiny_llama(), ["tiny_odds"], **settings) == first


def test_inputs_are_cut_to_the_length_asked_for(user_tasks: Path) -> None:
    model, tokenizer = tiny_llama()
    metrics, _ = evaluate_tasks(model, tokenizer, ["wikitext2_prefix"], limit=1, max_length=32)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=32)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    expected = lm_eval.simple_evaluate(lm, tasks=["wikitext2_prefix"], task_manager=manager, limit=1)
    (word, *_) = metrics
    assert word.value == pytest.approx(expected["results"]["wikitext2_prefix"]["word_perplexity,none"])


def test_a_group_gives_its_aggregate_under_its_own_name(user_tasks: Path) -> None:
    model, tokenizer = tiny_llama()
    metrics, _ = evaluate_tasks(
        model, tokenizer, ["tiny_group"], include_path=str(user_tasks), limit=6, batch_size=4
    )
    expected = stock(["tiny_group"], user_tasks, limit=6)
    values = {metric.name: metric.value for metric in metrics}
    assert set(values) == {"tiny_group/acc", "tiny_words/acc", "blimp_sample/acc"}
    assert values["tiny_group/acc"] == expected["tiny_group"]["acc,none"]


CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_ties_are_counted_and_accuracy_is_still_that_of_lm_eval(tmp_path: Path) -> None:
    """Three documents of ten offer the same choice twice; with a low one twice, nothing is tied."""
    choices = [["fox", "fox"]] * 3 + [["dog", "quick"]] * 6 + [["the quick brown fox"] * 2 + ["a"]]
    rows = [{"question": f"The lazy {i}", "choices": pair} for i, pair in enumerate(choices)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(CHOICE_TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "group.yaml").write_text("group: tiny_choices\ntask: [tiny_choice, blimp_sample]\n")
    metrics, _ = evaluate_tasks(*tiny_llama(), ["tiny_choices"], include_path=str(tmp_path), limit=10)
    found = {metric.name: metric for metric in metrics}
    assert [(m.name, m.value, m.unit) for m in metrics if m.name.endswith("/ties")] == [
        ("tiny_choice/ties", 3, "documents"),
        ("tiny_choices/ties", 3, "documents"),
    ]
    expected = stock(["tiny_choice"], tmp_path)["tiny_choice"]
    assert found["tiny_choice/acc"].value == expected["acc,none"]
    assert found["tiny_choice/acc_norm"].value == expected["acc_norm,none"]


def test_sentences_are_not_tied_by_rounding() -> None:
    """Log-likelihoods of some hundred nats are 1 or 2 nats apart in bfloat16."""
    model, tokenizer = tiny_llama()
    metrics, _ = evaluate_tasks(model.bfloat16(), tokenizer, ["blimp_sample"], limit=60)
    assert [metric.name for metric in metrics] == ["blimp_sample/acc"]


def test_unknown_tasks_and_folders_are_refused_before_anything_runs(user_tasks: Path) -> None:
    check_tasks([])
    check_tasks(["blimp_sample", "tiny_group"], str(user_tasks))
    with pytest.raises(RequestError, match=r"nowhere.*is not a folder"):
        check_tasks(["blimp_sample"], "nowhere")
    with pytest.raises(RequestError, match=r"unknown task 'blimp_smaple'; did you mean.*blimp_sample"):
        check_tasks(["blimp_sample", "blimp_smaple"])
    check_tasks(["mmlu", "wikitext", "blimp"])
    with pytest.raises(RequestError, match="'humaneval' executes code"):
        check_tasks(["humaneval"])


def test_missing_data_name_the_task(user_tasks: Path) -> None:
    (user_tasks / "data.jsonl").rename(user_tasks / "moved.jsonl")
    with pytest.raises(RequestError, match=r"tiny_words.*data\.jsonl"):
        evaluate_tasks(*tiny_llama(), ["tiny_words"], include_path=str(user_tasks))


def test_our_tasks_hold_the_official_definitions() -> None:
    stock_tasks = Path(lm_eval.__file__).parent / "tasks"
    pairs = {
        "blimp_sample": stock_tasks / "blimp" / "_template_yaml",
        "wikitext2_prefix": stock_tasks / "wikitext" / "wikitext.yaml",
    }
    replaced = {"task", "dataset_path", "dataset_name", "custom_dataset", "dataset_kwargs", "metadata"}
    replaced |= {"training_split", "validation_split", "should_decontaminate", "doc_to_decontamination_query"}
    for ours, official in pairs.items():
        assert _definition(TASKS / f"{ours}.yaml", replaced) == _definition(official, replaced)


def _definition(file: Path, left_out: set[str]) -> dict[str, object]:
    """The settings of a task; functions by their source, since lm-eval loads a module once per path."""
    settings = load_yaml(file).items()
    return {k: inspect.getsource(v) if callable(v) else v for k, v in settings if k not in left_out}


def test_prefix_pages_are_cut_at_top_level_headings() -> None:
    documents = _custom_documents("wikitext2_prefix", "test", num_pages=3)
    text = builtin_file("wikitext-2-raw-test.txt").read_text(encoding="utf-8")
    titles = [" = Robert Boulter = \n", " = Du Fu = \n", " = Kiss You ( One Direction song ) = \n"]
    assert [page["page"].splitlines(keepends=True)[0] for page in documents] == titles
    assert text.startswith(
        " \n" + "\n".join(page["page"] for page in documents) + "\n = Ise @-@ class battleship"
    )
    assert len(_custom_documents("wikitext2_prefix", "test", num_pages=1000)) == 62


def _custom_documents(task: str, split: str, **settings: object) -> list[dict[str, str]]:
    return load_yaml(TASKS / f"{task}.yaml")["custom_dataset"](**settings)[split].to_list()


@pytest.mark.long
def test_the_lm_eval_command_gives_the_same_digits(tmp_path: Path) -> None:
    """Run from another folder, as a user of the exported model would."""
    model_dir = save_tiny(tmp_path / "model")
    tasks = ["blimp_sample", "wikitext2_prefix"]
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model_dir}",
        "--include_path", str(TASKS), "--tasks", ",".join(tasks), "--batch_size", "8",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (file,) = (tmp_path / "out").rglob("results_*.json")
    expected = json.loads(file.read_text())["results"]
    metrics, _ = evaluate_tasks(*tiny_llama(), tasks, batch_size=8)
    assert len(metrics) == 4
    for metric in metrics:
        task, measure = metric.name.split("/")
        assert metric.value == pytest.approx(expected[task][f"{measure},none"], rel=1e-5)


def test_data_files_of_a_task_are_those_of_the_drivers_directory(
    user_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task with a path relative to where the campaign was started, evaluated by a worker elsewhere."""
    fill = {"name": "near", "metric": "acc", "aggregation": "mean", "kind": "loglikelihood"}
    (user_tasks / "near.yaml").write_text(FEWSHOT_TASK.format(data="data.jsonl", **fill))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data.jsonl").write_text(json.dumps({"question": "Another", "answer": "one"}) + "\n")
    settings: dict[str, Any] = {"include_path": str(user_tasks), "num_fewshot": 0}
    want, _ = evaluate_tasks(*tiny_llama(), ["tiny_words"], **settings)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("ITERABRE_DRIVER_DIRECTORY", str(user_tasks))
    got, _ = evaluate_tasks(*tiny_llama(), ["tiny_near"], **settings)
    assert [m.value for m in got] == [m.value for m in want]
    assert Path.cwd() == elsewhere


def chat_tokenizer_of(model_and_tokenizer: tuple[Any, Any]) -> tuple[Any, Any]:
    """A tiny model whose tokenizer writes conversations, and refuses a system's turn as some do."""
    model, tokenizer = model_and_tokenizer
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return model, tokenizer


CHAT_TASKS = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
description: "Answer.\\n"
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: ["jumps over", "is lazy"]
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""", """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
gen_prefix: "It"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""  # fmt: skip


@pytest.mark.parametrize("shots", [0, 2])
def test_conversations_are_those_of_lm_eval(
    shots: int, user_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very requests that plain lm-eval sends with --apply_chat_template, and the same numbers."""
    for i, task in enumerate(CHAT_TASKS):
        (user_tasks / f"chat{i}.yaml").write_text(task.format(data=user_tasks / "data.jsonl"))
    model, tokenizer = chat_tokenizer_of(tiny_llama())
    tasks = ["tiny_choice", "tiny_write", "tiny_words"]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    asked: list[tuple[Any, ...]] = []
    for kind in ("loglikelihood", "generate_until"):
        _record(monkeypatch, lm, kind, asked)
    manager = TaskManager(include_path=[str(TASKS), str(user_tasks)], include_defaults=False)
    results = lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=manager, num_fewshot=shots, apply_chat_template=True, limit=6
    )["results"]
    theirs = list(asked)
    assert any("assistant:" in request[0] for request in theirs)
    assert all(("user:" in request[0]) and "system" not in request[0] for request in theirs)

    asked.clear()
    for kind in ("loglikelihood", "generate_until"):
        _record(monkeypatch, PrefixTreeLM, kind, asked)
    metrics, _ = evaluate_tasks(
        model, tokenizer, tasks, include_path=str(user_tasks), num_fewshot=shots, limit=6, batch_size=4,
        apply_chat_template=True,
    )  # fmt: skip
    assert asked == theirs
    found = {metric.name: metric.value for metric in metrics}
    expected = {
        f"{task}/{key.partition(',')[0]}": value
        for task in tasks
        for key, value in results[task].items()
        if key.endswith(",none") and "stderr" not in key
    }
    assert found == expected
    plain, _ = evaluate_tasks(
        model, tokenizer, tasks, include_path=str(user_tasks), num_fewshot=shots, limit=6
    )
    assert all("user:" not in request[0] for request in asked[len(theirs) :])
    assert {metric.name for metric in plain} == set(found)


def _record(monkeypatch: pytest.MonkeyPatch, owner: object, kind: str, asked: list[tuple[Any, ...]]) -> None:
    """Note the arguments of every request that reaches `owner`."""
    answer = getattr(owner, kind)

    def recording(*arguments: Any, **options: Any) -> Any:
        asked.extend(request.args for request in arguments[-1])
        return answer(*arguments, **options)

    monkeypatch.setattr(owner, kind, recording)


@pytest.mark.parametrize("chat", [False, True])
def test_a_system_instruction_is_put_as_lm_eval_puts_it(
    chat: bool, user_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (user_tasks / "choice.yaml").write_text(CHAT_TASKS[0].format(data=user_tasks / "data.jsonl"))
    model, tokenizer = tiny_llama()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    settings = {"apply_chat_template": chat, "system_instruction": "Be brief.", "limit": 3}
    theirs: list[tuple[Any, ...]] = []
    _record(monkeypatch, lm, "loglikelihood", theirs)
    manager = TaskManager(include_path=[str(TASKS), str(user_tasks)], include_defaults=False)
    lm_eval.simple_evaluate(
        lm, tasks=["tiny_choice"], task_manager=manager, num_fewshot=1, fewshot_as_multiturn=chat, **settings
    )
    asked: list[tuple[Any, ...]] = []
    _record(monkeypatch, PrefixTreeLM, "loglikelihood", asked)
    evaluate_tasks(model, tokenizer, ["tiny_choice"], include_path=str(user_tasks), num_fewshot=1, **settings)
    assert asked == theirs
    assert all(request[0].startswith("system: Be brief." if chat else "Be brief.") for request in asked)


def test_a_template_without_a_systems_turn_is_reported_where_one_is_asked_for() -> None:
    model, tokenizer = chat_tokenizer_of(tiny_llama())
    with pytest.raises(RequestError, match=r"no system's turn \(no system\).*system_instruction"):
        evaluate_tasks(
            model, tokenizer, ["blimp_sample"], apply_chat_template=True, system_instruction="Be brief."
        )


def test_samples_are_written_as_lm_eval_writes_them(user_tasks: Path, tmp_path: Path) -> None:
    for i, task in enumerate(CHAT_TASKS):
        (user_tasks / f"task{i}.yaml").write_text(task.format(data=user_tasks / "data.jsonl"))
    tasks = ["tiny_choice", "tiny_write", "tiny_odds"]
    model, tokenizer = tiny_llama()
    settings = {"num_fewshot": 1, "limit": 3}
    manager = TaskManager(include_path=[str(TASKS), str(user_tasks)], include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    expected = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, **settings)
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.date_id = "today"
    (tmp_path / "ours").mkdir()
    results = evaluate_tasks_with(
        local_responder(model, tokenizer), tasks, include_path=str(user_tasks), **settings
    )
    write_samples(results.samples, tmp_path / "ours")
    assert dict(results.num_fewshot) == dict.fromkeys(tasks, 1)
    rounded = {"resps", "filtered_resps", "perplexity"}  # log-likelihoods, alike up to float32 rounding
    for task in tasks:
        tracker.save_results_samples(task, expected["samples"][task])
        (file,) = (tmp_path / "theirs").rglob(f"samples_{task}_today.jsonl")
        files = (tmp_path / f"ours/samples_{task}.jsonl", file)
        ours, theirs = ([json.loads(line) for line in each.read_text().splitlines()] for each in files)
        assert len(ours) == 3
        for got, want in zip(ours, theirs, strict=True):
            assert got.keys() == want.keys()
            assert len(got["resps"]) == len(want["resps"])
            exact = got.keys() - rounded
            assert {name: got[name] for name in exact} == {name: want[name] for name in exact}


def test_a_model_that_cannot_chat_is_reported(user_tasks: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        evaluate_tasks(*tiny_llama(), ["tiny_words"], include_path=str(user_tasks), apply_chat_template=True)


def test_each_task_has_the_examples_asked_for_it(user_tasks: Path) -> None:
    """As one call of lm-eval for each task; a task that sets 0 keeps it, as there."""
    model, tokenizer = tiny_llama()
    tasks = ["tiny_odds", "tiny_words", "blimp_sample"]
    asked = (("tiny_odds", 3), ("tiny_group", 1))
    found, _ = evaluate_tasks(
        model,
        tokenizer,
        ["tiny_odds", "tiny_group"],
        include_path=str(user_tasks),
        limit=6,
        num_fewshot=asked,
    )
    values = {metric.name: metric.value for metric in found}
    odds, words, blimp = (
        stock([task], user_tasks, limit=6, num_fewshot=shots)[task]
        for task, shots in zip(tasks, (3, 1, 1), strict=True)
    )
    assert values["tiny_odds/perplexity,first"] == pytest.approx(odds["perplexity,first"], rel=1e-5)
    assert values["tiny_words/acc"] == words["acc,none"]
    assert values["blimp_sample/acc"] == blimp["acc,none"]
    for other in (0, 1):
        changed = stock(["tiny_odds"], user_tasks, limit=6, num_fewshot=other)["tiny_odds"]
        assert values["tiny_odds/perplexity,first"] != pytest.approx(changed["perplexity,first"], rel=1e-3)
    own, _ = evaluate_tasks(
        model, tokenizer, ["tiny_odds", "tiny_words"], include_path=str(user_tasks), limit=6,
        num_fewshot=(("tiny_words", 2),),
    )  # fmt: skip
    zero = stock(["tiny_odds"], user_tasks, limit=6)["tiny_odds"]["perplexity,first"]
    assert {m.name: m.value for m in own}["tiny_odds/perplexity,first"] == pytest.approx(zero, rel=1e-5)


@pytest.mark.parametrize("name", ["tiny_wrods", "blimp_sample", "tiny_group"])
def test_examples_for_a_task_that_is_not_evaluated_are_refused(name: str, user_tasks: Path) -> None:
    with pytest.raises(RequestError, match=f"num_fewshot names '{name}'"):
        check_tasks(["tiny_words"], str(user_tasks), (("tiny_words", 1), (name, 1)))
