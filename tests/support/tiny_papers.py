"""What the papers' campaign files need to run here: tiny models of their families, tasks and data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from actors.contracts import TextSettings
from actors.evaluation import suite_tasks
from actors.evaluation.lm_eval.task_loading import TASKS as OUR_TASKS
from orchestrator.config import CampaignConfig, MethodConfig
from tests.support.tiny_models import tiny_model, tiny_tokenizer

MODELS: dict[str, tuple[str, int]] = {
    "llama-2-7b": ("llama", 32),
    "llama-2-13b": ("llama", 40),
    "llama-2-70b": ("llama", 80),
    "llama-3.1-8b": ("llama", 32),
    "llama-3.1-8b-it": ("llama", 32),
    "llama-3.2-1b": ("llama", 16),
    "llama-3.2-3b": ("llama", 28),
    "mistral-7b": ("mistral", 32),
    "mistral-7b-it": ("mistral", 32),
    "phi-2": ("phi", 32),
    # The first Qwen brings code of its own, from the hub; its successor has the same blocks.
    "qwen-7b": ("qwen2", 32),
    "qwen-14b": ("qwen2", 40),
    "qwen2.5-0.5b": ("qwen2", 24),
    "qwen2.5-7b": ("qwen2", 28),
    "qwen2.5-7b-it": ("qwen2", 28),
    "gemma2-2b-it": ("gemma2", 26),
}
"""Family and number of layers of each model that the files name."""

CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
ROWS = 80
SEQUENCE_LENGTH = 64
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": 0,
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TASKS: dict[str, dict[str, Any]] = {
    "wikitext": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "gsm8k": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [{"name": "strict-match", "filter": [{"function": "take_first"}]}],
    },
}
"""How a task is put that is no choice among answers, as the others are (`CHOICE`)."""

OURS = ("xsum", "humaneval_plus_instruct", "mbpp_plus_instruct")
"""Tasks that ship with the project, asked as they are of other data."""

PROBLEM = {
    "prompt": "def area(width, height):\n",
    "code": "def area(width, height):\n    return width * height",
    "entry_point": "area",
    "test": "def check(area): assert area(2, 3) == 6",
    "test_list": ["assert area(2, 3) == 6", "assert area(0, 1) == 0", "assert area(1, 1) == 1"],
    "document": "The quick brown fox jumps over the lazy dog .",
    "summary": "A fox jumps .",
}


def save_models(directory: Path, layers: int | None = None) -> None:
    """Save a tiny model for every name in `MODELS`, as deep as its namesake unless `layers` is given."""
    tokenizer = tiny_tokenizer()
    for name, (family, depth) in MODELS.items():
        depth = layers or depth
        kinds = {"layer_types": ["sliding_attention", "full_attention"] * (depth // 2)}
        model = tiny_model(family, num_hidden_layers=depth, **(kinds if family == "gemma2" else {}))
        tokenizer.chat_template = CHAT if name.endswith("-it") else None
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


def save_tasks(directory: Path, names: list[str]) -> Path:
    """Write lm-eval tasks of those names, in the place of lm-eval's own; the folder they are in."""
    directory.mkdir()
    _write_rows(directory / "rows.jsonl")
    (directory / "problems.jsonl").write_text(f"{json.dumps(PROBLEM)}\n" * 4)
    for name in names:
        if name in OURS:
            given, data = {"include": str(OUR_TASKS / f"{name}.yaml")}, "problems.jsonl"
        else:
            given, data = (
                {"test_split": "test", "fewshot_split": "test", **TASKS.get(name, CHOICE)},
                "rows.jsonl",
            )
        task = {
            **given,
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(directory / data)}},
        }
        if name in OURS:
            task["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 3}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return directory


def tiny_settings(config: CampaignConfig, models: Path, directory: Path) -> list[str]:
    """`--set` values by which a paper's campaign runs on tiny models and a few rows, written to `directory`.

    Methods, schedules, targets, adapters, learning rates, suites and probes stay the paper's.
    """
    _write_rows(rows := directory / "rows.jsonl")
    evaluation = config.evaluation
    tasks = [*suite_tasks(evaluation.suites), *evaluation.tasks]
    settings = [
        "execution.backend=local",
        f"storage.path={directory / 'runs'}",
        f"evaluation.include_path={save_tasks(directory / 'tasks', tasks)}",
        "evaluation.limit=2",
        "evaluation.max_length=256",
        "evaluation.max_new_tokens=4",
    ]
    if evaluation.throughput:
        settings.append("evaluation.throughput={context: 8, new_tokens: 2, repeats: 1}")
    texts = [
        {"name": text.name, "data": {"path": str(rows)}, "context": 32, "max_tokens": 64}
        for text in evaluation.perplexity
    ]
    settings.append(f"evaluation.perplexity={json.dumps(texts)}")
    for i, model in enumerate(config.models):
        settings.append(f"models.{i}.path={models / model.id}")
        for field, value in _budget(config.methods[0]).items():
            if field in model.overrides.recovery:
                settings.append(f"models.{i}.overrides.recovery.{field}={value}")
    for i, method in enumerate(config.methods):
        settings += _method_settings(f"methods.{i}", method, rows)
    return settings


def _budget(method: MethodConfig) -> dict[str, int]:
    """Two steps of the paper's batch."""
    return {
        "sequence_length": SEQUENCE_LENGTH,
        "max_tokens": 2 * method.recovery.batch_size * SEQUENCE_LENGTH,
    }


def _method_settings(place: str, method: MethodConfig, rows: Path) -> Iterator[str]:
    yield from _on_rows(f"{place}.scoring.calibration", method.scoring.calibration, rows)
    yield from (f"{place}.scoring.{field}" for field in ("max_sequences=2", "sequence_length=32"))
    if method.scoring.task:
        yield f"{place}.scoring.task.limit=1"
    if method.recovery.objective == "none":
        return
    yield from _on_rows(f"{place}.recovery.data", method.recovery.data, rows)
    yield from (f"{place}.recovery.{field}={value}" for field, value in _budget(method).items())
    if method.recovery.objective == "sgr":
        for field in ("engine=transformers", "max_prompts=16", "max_new_tokens=4"):
            yield f"{place}.recovery.generation.{field}"


def _on_rows(place: str, text: TextSettings, rows: Path) -> list[str]:
    """A text that is not built in is read from `rows`, by the same columns."""
    return [] if text.builtin else [f"{place}.path={rows}"]


def _write_rows(file: Path) -> None:
    """Rows with every column that the papers' files and the tasks ask for."""
    with file.open("w", encoding="utf-8") as stream:
        for i in range(ROWS):
            question, answer = f"Who jumps over the lazy dog {i} ?", f"The quick brown fox {i}"
            row = {
                "text": f"{question} {answer} . Stability of the higher layer is greater . ",
                "question": question,
                "instruction": question,
                "input": "",
                "answer": answer,
                "output": answer,
                "choices": [" the fox", " the dog"],
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
            }
            stream.write(json.dumps(row) + "\n")
