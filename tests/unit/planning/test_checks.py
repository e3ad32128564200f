"""What is known without weights is refused by `plan` and by `campaign` alike, before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import parse_config
from orchestrator.planning.planner import build_plan
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.support.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from tests.unit.cli.command import iterabre

Campaign = dict[str, Any]
POSITIONS = 48
ROWS = len(tiny_tokenizer())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with few positions, of families that count them in tables and of one that does not."""
    directory = tmp_path_factory.mktemp("checks")
    tiny_campaign(directory)
    more = tiny_tokenizer()
    more.add_tokens(["<|im_start|>"])
    positions = {"max_position_embeddings": POSITIONS, "n_positions": POSITIONS}
    families: dict[str, dict[str, Any]] = {
        "gpt2": positions,
        "opt": positions | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "gptj": positions,
        "qwen2": positions,
    }
    for family, fields in families.items():
        tiny_model(family, **fields).save_pretrained(directory / family)
        tiny_tokenizer().save_pretrained(directory / family)
    save_tiny(directory / "more-tokens")
    more.save_pretrained(directory / "more-tokens")
    save_tiny(directory / "teacher")
    more.save_pretrained(directory / "teacher")
    (directory / "long.txt").write_text("a bridge over a river . " * 40 + "\n")
    (directory / "chat.jsonl").write_text(json.dumps({"text": "<|im_start|>user a bridge"}) + "\n")
    (directory / "short.txt").write_text("a bridge\n")
    (directory / "scheduler.json").write_text(json.dumps({"scheduler": {"type": "WarmupLR"}}))
    (directory / "broken.json").write_text('{"bf16": {\n}')
    (directory / "latin.json").write_bytes('{"größe": 1}'.encode("latin-1"))
    return directory


def _method(campaign: Campaign) -> Campaign:
    return campaign["methods"][0]


def _campaign(place: Path, model: str) -> Campaign:
    """A campaign that fits into `POSITIONS`."""
    campaign = tiny_campaign(place)
    campaign["models"] = [{"id": "m", "path": str(place / model)}]
    campaign["targets"] = [{"layers": 3}]
    return campaign


def _perplexity(campaign: Campaign) -> Campaign:
    return campaign["evaluation"]["perplexity"][0]


TABLES = ("gpt2", "opt", "gptj")
ON_MODEL = "method 'iterabre' on model 'm': "

TABLE: dict[str, tuple[tuple[str, ...], Callable[[Campaign, Path], Any], tuple[str, ...]]] = {
    "a calibration text that is longer": (
        TABLES,
        lambda c, place: _method(c)["scoring"].update(
            calibration={"path": f"{place}/long.txt"}, sequence_length=100
        ),
        (
            ON_MODEL,
            "scoring.sequence_length 100 lets the calibration text have 100 tokens",
            "has 48 positions",
        ),
    ),
    "longer training sequences": (
        TABLES,
        lambda c, _: _method(c)["recovery"].update(sequence_length=64, max_tokens=256),
        (ON_MODEL, "recovery.sequence_length is 64", "has 48 positions and no more"),
    ),
    "a longer context of a perplexity": (
        (*TABLES, "qwen2"),
        lambda c, _: _perplexity(c).update(context=49),
        ("model 'm': evaluation.perplexity 'fox': a context of 49 tokens is more than the 48 positions",),
    ),
    "longer inputs of tasks": (
        TABLES,
        lambda c, _: c["evaluation"].update(tasks=["blimp_sample"], max_length=49),
        ("model 'm': evaluation.max_length is 49", "has 48 positions"),
    ),
    "longer answers of a probe": (
        TABLES,
        lambda c, _: c["evaluation"].update(probes=["degeneration"], max_new_tokens=40),
        ("model 'm': evaluation.max_new_tokens 40 makes ", "with the longest prompt", "has 48 positions"),
    ),
    "a longer run of throughput": (
        (*TABLES, "qwen2"),
        lambda c, _: c["evaluation"].update(throughput={"context": 40, "new_tokens": 9}),
        ("model 'm': evaluation.throughput: context 40 and new_tokens 9 are more than the 48 positions",),
    ),
    "answers that leave no room for prompts": (
        (*TABLES, "qwen2"),
        lambda c, place: _method(c).update(
            recovery={
                "objective": "sgr",
                "data": {"path": f"{place}/chat.jsonl", "prompt_column": "text", "chat_template": "plain"},
                "generation": {"max_new_tokens": 48},
                "sequence_length": 16,
                "max_tokens": 10_000,
            }
        ),
        (ON_MODEL, "recovery.generation.max_new_tokens 48 leaves no room for a prompt in the 48 positions"),
    ),
    "a calibration token without a row": (
        ("more-tokens",),
        lambda c, place: _method(c)["scoring"].update(calibration={"path": f"{place}/chat.jsonl"}),
        (
            ON_MODEL,
            "scoring.calibration: the tokenizer of ",
            f"'<|im_start|>' (id {ROWS})",
            f"{ROWS} rows",
        ),
    ),
    "a measured token without a row": (
        ("more-tokens",),
        lambda c, place: _perplexity(c).update(data={"path": f"{place}/chat.jsonl"}),
        ("model 'm': evaluation.perplexity 'fox': ", f"'<|im_start|>' (id {ROWS})"),
    ),
    "a trained token without a row": (
        ("more-tokens",),
        lambda c, place: _method(c)["recovery"].update(
            data={"path": f"{place}/chat.jsonl"}, sequence_length=2, batch_size=1, max_tokens=8
        ),
        (ON_MODEL, "recovery.data: ", f"'<|im_start|>' (id {ROWS})"),
    ),
    "less recovery text than a sequence": (
        ("model",),
        lambda c, place: _method(c)["recovery"].update(data={"path": f"{place}/short.txt"}),
        (ON_MODEL, "short.txt' gives ", "fewer than one sequence of 16"),
    ),
    "less recovery text than a batch": (
        ("model",),
        lambda c, place: _method(c)["recovery"].update(
            data={"path": f"{place}/long.txt"}, batch_size=64, max_tokens=10_000
        ),
        (ON_MODEL, "the recovery data gives ", "fewer than one batch of 64"),
    ),
    "a target that names no layer": (
        ("model", "gpt2"),
        lambda c, _: _method(c)["recovery"]["adapter"].update(targets=["wq"]),
        (ON_MODEL, "recovery.adapter.targets: adapter target 'wq' names no linear layer"),
    ),
    "a teacher of other tokens": (
        ("model",),
        lambda c, place: _method(c)["recovery"].update(
            teacher={"id": "t", "path": f"{place}/teacher"}, loss={"hidden": 0, "attention": 0}
        ),
        (ON_MODEL, "recovery.teacher: ", "their vocabularies differ"),
    ),
    "a DeepSpeed file with a scheduler": (
        ("model",),
        lambda c, place: c["execution"].update(training={"deepspeed": f"{place}/scheduler.json"}),
        ("execution.training.deepspeed '", "scheduler.json': DeepSpeed field 'scheduler'"),
    ),
    "a DeepSpeed file that nothing is trained with": (
        ("model",),
        lambda c, place: (
            _method(c).update(recovery={"objective": "none"}),
            c["execution"].update(training={"deepspeed": f"{place}/scheduler.json"}),
        ),
        ("scheduler.json': DeepSpeed field 'scheduler'",),
    ),
    "a DeepSpeed file that is cut off": (
        ("model",),
        lambda c, place: c["execution"].update(training={"deepspeed": f"{place}/broken.json"}),
        ("broken.json': the DeepSpeed configuration is not JSON: ", "line 2 column 2"),
    ),
    "a DeepSpeed file in another encoding": (
        ("model",),
        lambda c, place: c["execution"].update(training={"deepspeed": f"{place}/latin.json"}),
        ("latin.json' is not UTF-8 text",),
    ),
}
CASES = [(name, model) for name, (models, _, _) in TABLE.items() for model in models]


@pytest.mark.parametrize(("name", "model"), CASES)
def test_plan_and_campaign_refuse_alike(place: Path, tmp_path: Path, name: str, model: str) -> None:
    _, change, messages = TABLE[name]
    campaign = _campaign(place, model)
    change(campaign, place)
    file = write_campaign(campaign, tmp_path / "campaign.yaml")
    for command in ("plan", "campaign"):
        answer = iterabre(command, file)
        assert answer.exit_code == 2, answer.err
        for message in messages:
            assert message in answer.err
        assert "Traceback" not in answer.err
        assert not (place / "runs").exists()


@pytest.mark.parametrize("model", [*TABLES, "qwen2", "more-tokens"])
def test_what_fits_is_planned_without_a_note(place: Path, model: str) -> None:
    assert build_plan(parse_config(_campaign(place, model), "campaign.yaml")).notes == ()


def test_beyond_the_named_context_rotary_positions_go_on_with_a_note(place: Path, tmp_path: Path) -> None:
    campaign = _campaign(place, "qwen2")
    _method(campaign)["recovery"].update(sequence_length=64, max_tokens=256)
    file = write_campaign(campaign, tmp_path / "campaign.yaml")
    answer = iterabre("plan", file)
    assert answer.exit_code == 0, answer.err
    note = (
        f"recovery.sequence_length is 64, longer than the 48 tokens that model '{place / 'qwen2'}' was made"
    )
    assert note in answer.out
    (reported,) = json.loads(iterabre("plan", file, "--json").out)["notes"]
    assert note in reported


@pytest.mark.parametrize("model", TABLES)
@pytest.mark.parametrize(
    "command",
    [
        ("score", "--calibration", "long.txt"),
        ("evaluate", "--probes", "degeneration"),
        ("sweep", "--probes", "degeneration", "--max-new-tokens", POSITIONS, "--output", "out"),
    ],
    ids=lambda command: command[0],
)
def test_single_commands_refuse_what_has_no_position(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...], model: str
) -> None:
    monkeypatch.chdir(place)
    answer = iterabre(*command, "--model", place / model)
    assert (answer.exit_code, answer.out) == (2, ""), answer.err
    assert f"has {POSITIONS} positions and no more" in answer.err
    assert not (place / "out").exists()


def test_a_text_exchanged_while_a_command_runs_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a bridge over a river\n")

    def exchange(*_: object) -> list[str]:
        file.write_text("another text\n")
        return []

    monkeypatch.setattr("orchestrator.planning.checks.check_calibration", exchange)
    answer = iterabre("score", "--model", place / "qwen2", "--calibration", file)
    assert answer.exit_code == 1
    assert str(file) in answer.err


@pytest.mark.parametrize("given", ["max_tokens", "start_tokens"])
@pytest.mark.parametrize(("tokens", "noted"), [(31, True), (32, False)])
def test_a_bridge_that_its_text_does_not_determine_is_noted(
    place: Path, given: str, tokens: int, noted: bool
) -> None:
    campaign = _campaign(place, "qwen2")
    _method(campaign)["recovery"] |= {"start": "linear_bridge", given: tokens, "batch_size": 1}
    notes = build_plan(parse_config(campaign, "campaign.yaml")).notes
    wanted = f"recovery.{given} {tokens} is fewer than the 32 numbers of a hidden state of 'm'"
    assert any(wanted in note for note in notes) == noted
