"""Hundreds of damaged models, campaign files and data files: refused in one message, or read rightly.

What "rightly" is comes from plain readers: transformers with hooks that skip a block,
PyYAML, Python's json and csv, pandas. Damage that leaves another valid input is no fault,
as long as the command means by it what the plain reader means.
"""

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pandas
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.contracts import TextSpec
from actors.data.text import load_texts
from actors.errors import RequestError
from orchestrator.config import load_config
from tests.support.mutations import mutate, mutate_directory
from tests.support.tiny_campaign import tiny_campaign
from tests.support.tiny_models import blocks_of, skipped, tiny_llama
from tests.unit.cli.command import Answer, iterabre
from tests.unit.scoring.plain import hidden_cosine

NUM_MODELS, NUM_CAMPAIGNS, NUM_TEXTS = 300, 150, 150
LINES = [
    "The quick brown fox jumps over the lazy dog .",
    "Ancient deities are the gods , 007 .",
    "grün  ½ \u2028 x",
]
TOLERANCE = 1e-4
DROPPED = 1


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One model as a single file and the same one in shards; both with a text of three lines."""
    model, tokenizer = tiny_llama(num_layers=3)
    directories = []
    for name, shard_size in (("single", "1GB"), ("shards", "60KB")):
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory, max_shard_size=shard_size)
        tokenizer.save_pretrained(directory)
        directories.append(directory)
    return directories


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "text.txt"
    file.write_text("\n".join(LINES))
    return file


def test_damaged_model_directories(templates: list[Path], calibration: Path, tmp_path: Path) -> None:
    faults: list[str] = []
    ends: Counter[str] = Counter()
    for number in range(NUM_MODELS):
        rng = Random(f"model {number}")
        model, output = tmp_path / f"model{number}", tmp_path / f"pruned{number}"
        shutil.copytree(templates[number % 2], model)
        done = mutate_directory(model, rng)
        before = _content(model)
        for command in ("score", "prune"):
            if command == "score":
                answer = iterabre("score", "--json", "--model", model, "--calibration", calibration)
            else:
                answer = iterabre("prune", "--model", model, "--drop", DROPPED, "--output", output)
            ends[f"{command} {answer.exit_code}"] += 1
            fault = _fault(answer)
            if answer.exit_code == 2 and output.exists():
                fault = "it was refused, and yet something was written"
            if answer.exit_code == 0:
                fault = fault or (
                    _misread_scores(model, calibration, answer.out)
                    if command == "score"
                    else _misread_pruning(model, output)
                )
            if _content(model) != before:
                fault = "the source was changed"
            if fault:
                faults.append(f"{number}: {done}: {command}: {fault}")
        shutil.rmtree(model)
        shutil.rmtree(output, ignore_errors=True)
    assert not faults, f"{len(faults)} of {NUM_MODELS}; {dict(ends)}:\n" + "\n".join(faults)
    assert (
        min(ends[f"{command} {code}"] for command in ("score", "prune") for code in (0, 2)) > NUM_MODELS / 20
    )


def test_damaged_campaign_files(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    faults: list[str] = []
    ends: Counter[int] = Counter()
    for number in range(NUM_CAMPAIGNS):
        rng = Random(f"campaign {number}")
        file = tmp_path / "campaign.yaml"
        # JSON is YAML, so that single fields can be damaged, too.
        text = (
            json.dumps(campaign, indent=1)
            if rng.random() < 0.5
            else yaml.safe_dump(campaign, sort_keys=False)
        )
        file.write_text(text)
        done = mutate(file, rng)
        answer = iterabre("plan", file)
        ends[answer.exit_code] += 1
        fault = _fault(answer)
        if answer.exit_code == 0:
            fault = fault or _misread_campaign(file)
        if (tmp_path / "runs").exists():
            fault = "something was written"
        if fault:
            faults.append(f"{number}: {done}: {fault}")
    assert not faults, f"{len(faults)} of {NUM_CAMPAIGNS}; {dict(ends)}:\n" + "\n".join(faults)
    assert ends[0] > 10
    assert ends[2] > 10


def test_damaged_data_files(tmp_path: Path) -> None:
    campaign_file = tmp_path / "campaign.yaml"
    campaign_file.write_text(yaml.safe_dump(tiny_campaign(tmp_path)))
    faults: list[str] = []
    ends: Counter[int] = Counter()
    for number in range(NUM_TEXTS):
        rng = Random(f"text {number}")
        file = tmp_path / f"data{number}{rng.choice(['.txt', '.jsonl', '.json', '.csv', '.parquet'])}"
        _write_rows(file, [LINES[i % 3] + f"\n{i}" * (i % 2) for i in range(40)])
        done = mutate(file, rng)
        streaming = rng.random() < 0.5 and file.suffix != ".json"
        field = "methods.0.recovery.data"
        answer = iterabre(
            "plan", campaign_file, "--set", f"{field}.path={file}", "--set", f"{field}.streaming={streaming}"
        )
        ends[answer.exit_code] += 1
        if fault := _fault(answer) or _misread_text(file, streaming):
            faults.append(f"{number}: {done}, streaming {streaming}: exit {answer.exit_code}: {fault}")
    assert not faults, f"{len(faults)} of {NUM_TEXTS}; {dict(ends)}:\n" + "\n".join(faults)
    assert ends[0] > 10
    assert ends[2] > 10


def _fault(answer: Answer) -> str | None:
    """What no command may do, whatever it is given."""
    if "Traceback" in answer.err or answer.exit_code not in (0, 2):
        return f"exit {answer.exit_code}: {answer.err.strip()[-300:]}"
    if answer.exit_code == 2 and (answer.out or not answer.err.strip()):
        return "it was refused without a message, or with output"
    return None


def _content(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def _plainly_loaded(directory: Path) -> Any:
    """What transformers reads, if every weight was there; None otherwise."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, dtype=torch.float32
        )
    except Exception:
        return None
    return None if any(loading[name] for name in ("missing_keys", "mismatched_keys")) else model.eval()


def _misread_scores(directory: Path, calibration: Path, out: str) -> str | None:
    model = _plainly_loaded(directory)
    if model is None:
        return "scored, though transformers does not read it whole"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sequences = [torch.tensor(tokenizer(line)["input_ids"]) for line in calibration.read_text().split("\n")]
    want = hidden_cosine(model, model, sequences, 1)
    got = [row["score"] for row in json.loads(out)["layers"]]
    close = len(got) == len(want) and torch.allclose(
        torch.tensor(got), torch.tensor(want), atol=TOLERANCE, equal_nan=True
    )
    return None if close else f"scores {got} where plain transformers gives {want}"


@torch.no_grad()
def _misread_pruning(directory: Path, output: Path) -> str | None:
    whole, pruned = _plainly_loaded(directory), _plainly_loaded(output)
    if whole is None or pruned is None:
        return "pruned, though transformers does not read the source or the result whole"
    ids = torch.arange(3, 23)[None]
    with skipped(whole, [DROPPED]):
        want = whole(ids, use_cache=False).logits
    if len(blocks_of(pruned)) != len(blocks_of(whole)) - 1:
        return "not one layer fewer"
    close = torch.allclose(pruned(ids, use_cache=False).logits, want, atol=TOLERANCE, equal_nan=True)
    return None if close else "the pruned model computes something else"


def _misread_campaign(file: Path) -> str | None:
    """Every value that PyYAML finds in the file has to stand in the configuration."""
    said = yaml.safe_load(file.read_bytes())
    meant = load_config(file).model_dump(mode="json")
    return next(
        (f"{place} is {value!r}" for place, value in _leaves(said) if not _holds(meant, place, value)), None
    )


def _leaves(value: Any, *place: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, *place, name)
    elif isinstance(value, list):
        for position, part in enumerate(value):
            yield from _leaves(part, *place, position)
    else:
        yield place, value


def _holds(meant: Any, place: tuple[Any, ...], value: Any) -> bool:
    for step in place:
        if not isinstance(meant, (dict, list, tuple)):
            return False
        meant = meant[step] if isinstance(step, int) or step in meant else None
    return bool(meant == value) or str(value) in str(meant)


def _write_rows(file: Path, rows: list[str]) -> None:
    if file.suffix == ".txt":
        file.write_text("".join(row + "\n" for row in rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": row, "id": i}) + "\n" for i, row in enumerate(rows)))
    elif file.suffix == ".json":
        file.write_text(json.dumps([{"text": row, "id": i} for i, row in enumerate(rows)]))
    elif file.suffix == ".csv":
        pandas.DataFrame({"id": range(len(rows)), "text": rows}).to_csv(file, index=False)
    else:
        pandas.DataFrame({"text": rows}).to_parquet(file)


def _misread_text(file: Path, streaming: bool) -> str | None:
    try:
        got = load_texts(TextSpec(path=str(file), streaming=streaming))
    except RequestError as error:
        return None if file.name in str(error) else f"the message does not name the file: {error}"
    try:
        want = _plain_rows(file)
    except Exception as error:
        return f"read, though a plain reader refuses it: {error}"
    return None if got == want else f"read as {len(got)} rows, unlike the {len(want)} of a plain reader"


def _plain_rows(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        return pandas.read_parquet(file)["text"].tolist()
    if file.suffix == ".json":
        return [row["text"] for row in json.loads(file.read_bytes())]
    text = file.read_bytes().decode("utf-8-sig")
    if file.suffix == ".csv":
        return [row["text"] for row in csv.DictReader(io.StringIO(text, newline=""))]
    text = text.replace("\r\n", "\n")
    if file.suffix == ".txt":
        return [line + "\n" for line in text.split("\n")[:-1]] + [text.split("\n")[-1]] * (
            not text.endswith("\n")
        )
    return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
