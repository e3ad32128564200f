"""A whole campaign in this process, through the command line, on a tiny random Llama."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.storage.ledger import Ledger
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import Answer, iterabre

TRAJECTORY = "llama--iterabre--seed0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("campaign")


@pytest.fixture(scope="module")
def config(place: Path) -> str:
    campaign = tiny_campaign(place)
    campaign["evaluation"] |= {"tasks": ["blimp_sample"], "limit": 5}
    return write_campaign(campaign, place / "campaign.yaml")


@pytest.fixture(scope="module")
def finished(config: str) -> Answer:
    return iterabre("campaign", config)


@pytest.fixture
def run(place: Path, finished: Answer) -> Path:
    assert finished.exit_code == 0, finished.err
    return place / "runs/tiny"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; its stages are found although it was moved."""
    shutil.copytree(run, tmp_path / "runs/tiny")
    return tmp_path / "runs/tiny"


def _resume(config: str, run: Path) -> Answer:
    return iterabre("campaign", config, "--resume", "--set", f"storage.path={run.parent}")


def _times(directory: Path) -> dict[str, int]:
    return {
        str(file.relative_to(directory)): file.stat().st_mtime_ns
        for kind in ("stages", "ledger", "models")
        for file in sorted((directory / kind).rglob("*"))
        if file.is_file()
    }


def _ledger(run: Path) -> pa.Table:
    return Ledger(str(run / "ledger")).read()


def _measured(run: Path) -> dict[tuple[Any, ...], float]:
    """Every number but the times, by what it is."""
    rows = [row for row in _ledger(run).to_pylist() if row["unit"] != "s"]
    names = ("trajectory", "iteration", "stage", "phase", "key", "metric", "step", "layer")
    return {tuple(row[name] for name in names): row["value"] for row in rows}


def test_the_command_shows_results_and_where_they_are(run: Path, finished: Answer) -> None:
    assert f"Models   {run}/models" in finished.out
    assert f"Report   {run}/report/index.html" in finished.out
    assert max(map(len, finished.out.split("\n\n")[0].splitlines())) <= 80
    assert f"{TRAJECTORY}: done" in finished.err
    assert "Traceback" not in finished.err


def test_the_report_holds_config_and_versions(run: Path) -> None:
    page = (run / "report/index.html").read_text()
    assert TRAJECTORY in page
    assert "max_tokens: 96" in page
    assert torch.__version__.split("+")[0] in page
    assert len(list((run / "report/tables").glob("iterations-*.md"))) == 1


def test_the_ledger_holds_every_stage_once(run: Path) -> None:
    table = _ledger(run)
    stages = table.filter(pc.equal(table["metric"], "seconds")).to_pylist()
    each = ["score", "evaluate", "recover", "evaluate"]
    assert sorted((row["iteration"], row["stage"]) for row in stages) == sorted(
        [(0, "evaluate")] + [(i, stage) for i in (1, 2) for stage in [*each, "export"]]
    )
    assert len(_measured(run)) == sum(row["unit"] != "s" for row in table.to_pylist())
    losses = table.filter(pc.equal(table["metric"], "loss")).to_pylist()
    assert [(row["iteration"], row["step"]) for row in losses] == [(i, s) for i in (1, 2) for s in (0, 1, 2)]
    dropped = table.filter(pc.equal(table["metric"], "dropped"))
    assert len(set(dropped["layer"].to_pylist())) == 2


@pytest.mark.parametrize("depth", [3, 2])
def test_exported_models_open_in_plain_transformers(run: Path, place: Path, depth: int) -> None:
    directory = run / f"models/{TRAJECTORY}/{depth}-layers"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.num_hidden_layers == len(model.model.layers) == depth
    assert "depth-pruning" in (directory / "README.md").read_text()
    provenance = json.loads((directory / "iterabre.json").read_text())
    assert provenance["layers"] == depth
    assert len(provenance["dropped_source_layers"]) == 4 - depth
    assert provenance["source_model"]["path"] == str(place / "model")
    assert provenance["recovery_tokens"] == 96 * (4 - depth)
    # The ledger's perplexity belongs to these very weights: measured again, the slow way.
    ids = tokenizer("".join((place / "text.txt").open()), return_tensors="pt").input_ids[:, :256]
    losses = [model(window, labels=window).loss.item() for window in ids.split(32, dim=1)]
    scores = provenance["scores"]
    assert scores["fox/loss_nats"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_plan_foresees_the_keys_of_all_stages(run: Path, config: str) -> None:
    """Before the run with placeholders, after it with what was chosen; then there is nothing to run."""
    fresh = json.loads(iterabre("plan", config, "--set", "storage.path=nowhere", "--json").out)["stages"]
    assert (fresh["finished"], fresh["to_run"]) == (0, 13)
    assert sum(1 for _ in run.glob("stages/*/*/manifest.json")) == 13 - 2  # A prune only records.
    left = json.loads(iterabre("plan", config, "--json").out)["stages"]
    assert (left["finished"], left["to_run"]) == (13, 0)


def test_resume_runs_nothing_again(run: Path, config: str) -> None:
    before = _times(run)
    answer = iterabre("campaign", config, "--resume")
    assert answer.exit_code == 0, answer.err
    assert _times(run) == before


def test_an_upgrade_of_packages_writes_no_export_again(
    copied: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _times(copied)
    newer = {"iterabre": "99.0", "torch": "99.0"}
    for module in ("orchestrator.export.provenance", "orchestrator.storage.run_manifest"):
        monkeypatch.setattr(f"{module}.installed_versions", lambda: newer)
    assert _resume(config, copied).exit_code == 0
    assert _times(copied) == before
    versions = json.loads((copied / f"models/{TRAJECTORY}/3-layers/iterabre.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__


def test_other_numbers_are_told_beside_an_export_that_stays(copied: Path, config: str) -> None:
    place = copied / f"models/{TRAJECTORY}/3-layers"
    made = json.loads((place / "iterabre.json").read_text())
    old = made | {"scores": {"fox/token_perplexity": 1.5}, "versions": {"torch": "0.1"}}
    (place / "iterabre.json").write_text(json.dumps(old))
    before = _times(copied)
    assert _resume(config, copied).exit_code == 0
    changed = {name for name, time in _times(copied).items() if before[name] != time}
    assert changed == {f"models/{TRAJECTORY}/3-layers/{name}" for name in ("README.md", "iterabre.json")}
    assert json.loads((place / "iterabre.json").read_text()) == made | {"versions": {"torch": "0.1"}}


def test_an_export_of_an_earlier_version_is_not_written_again(copied: Path, config: str) -> None:
    """Its key held its card and provenance, its payload their files, and its result was a file of its own."""
    for number, stage in enumerate(sorted((copied / "stages/export").iterdir())):
        manifest = json.loads((stage / "manifest.json").read_text())
        directory = manifest["inputs"].pop("directory")
        manifest["inputs"] |= {"card": "another wording", "provenance": "{}"}
        described = (copied / "models" / directory / "iterabre.json").read_bytes()
        file = {"name": "iterabre.json", "size_bytes": 1, "sha256": hashlib.sha256(described).hexdigest()}
        manifest["payload"]["files"].append(file)
        manifest["result"]["artifact"]["files"].append(file)
        manifest |= {"key": f"{number}" * 64, "format": 1}
        result = json.dumps(manifest["result"]).encode()
        (stage / "result.json").write_bytes(result)
        digest = hashlib.sha256(result).hexdigest()
        manifest["result"] = {"name": "result.json", "size_bytes": len(result), "sha256": digest}
        (stage / "manifest.json").write_text(json.dumps(manifest))
        stage.rename(stage.with_name(manifest["key"]))
    left = json.loads(iterabre("plan", config, "--set", f"storage.path={copied.parent}", "--json").out)
    assert left["stages"]["to_run"] == 0
    before = {name: time for name, time in _times(copied).items() if name.startswith("models/")}
    assert _resume(config, copied).exit_code == 0
    assert {name: time for name, time in _times(copied).items() if name.startswith("models/")} == before
    assert len(list((copied / "stages/export").iterdir())) == 4


def test_an_export_of_an_earlier_version_that_is_gone_is_written_again(copied: Path, config: str) -> None:
    test_an_export_of_an_earlier_version_is_not_written_again(copied, config)
    for stage in (copied / "stages/export").iterdir():
        if len(set(stage.name)) > 1:
            shutil.rmtree(stage)
    (copied / f"models/{TRAJECTORY}/3-layers/model.safetensors").unlink()
    assert _resume(config, copied).exit_code == 0
    assert (copied / f"models/{TRAJECTORY}/3-layers/model.safetensors").is_file()


def test_a_lost_recovery_alone_is_run_again(copied: Path, config: str) -> None:
    before, numbers = _times(copied), _measured(copied)
    (lost, *_) = sorted((copied / "stages/recover").iterdir())
    shutil.rmtree(lost)
    answer = _resume(config, copied)
    assert answer.exit_code == 0, answer.err
    after = _times(copied)
    again = {name for name in after if after[name] != before.get(name)}
    assert again
    assert all(name.startswith(f"stages/recover/{lost.name}/") for name in again)
    assert _measured(copied) == numbers


def test_a_damaged_stage_is_quarantined_and_run_again(copied: Path, config: str) -> None:
    numbers = _measured(copied)
    (damaged, *_) = (copied / "stages/score").iterdir()
    manifest = damaged / "manifest.json"
    result = json.loads(manifest.read_text())["result"]
    manifest.write_text(manifest.read_text()[:-20])
    assert _resume(config, copied).exit_code == 0
    assert json.loads(manifest.read_text())["result"] == result
    assert len(list((copied / "stages/quarantine").iterdir())) == 1
    assert _measured(copied) == numbers


def test_a_field_that_came_later_is_at_its_default(copied: Path, config: str) -> None:
    before = _times(copied)
    file = copied / "campaign.json"
    recorded = json.loads(file.read_text())
    del recorded["config"]["execution"]["cluster_maximum"]
    del recorded["config"]["methods"][0]["recovery"]["packing"]
    file.write_text(json.dumps(recorded))
    answer = _resume(config, copied)
    assert answer.exit_code == 0
    assert _times(copied) == before
    # Where the run lies is all that differs.
    assert "packing" not in answer.err
    assert "cluster_maximum" not in answer.err


def test_status_and_report_read_the_run(run: Path) -> None:
    status = json.loads(iterabre("status", run, "--json").out)
    assert status["outcomes"] == {TRAJECTORY: {"state": "done", "reason": "", "log": ""}}
    lines = status["iterations"]
    assert [line["layers"] for line in lines] == [4, 3, 2]
    assert lines[0]["dropped"] is None
    assert lines[2]["fox/token_perplexity"] > 1
    assert "fox" in iterabre("status", run).out
    assert iterabre("report", run).out.strip() == f"{run}/report/index.html"


def test_export_of_any_iteration_is_the_campaigns_model(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    answer = iterabre("export", run, "--trajectory", TRAJECTORY, "--iteration", 1, "--output", output)
    assert answer.exit_code == 0, answer.err
    assert answer.out.startswith(f"{output}: 3 layers, ")
    exported = AutoModelForCausalLM.from_pretrained(output).state_dict()
    campaign = AutoModelForCausalLM.from_pretrained(run / f"models/{TRAJECTORY}/3-layers").state_dict()
    assert all(torch.equal(exported[name], campaign[name]) for name in campaign)


def test_export_needs_no_more_than_the_recovery(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "stages/evaluate")
    shutil.rmtree(copied / "stages/export")
    arguments = ("--trajectory", TRAJECTORY, "--iteration", 2, "--output", tmp_path / "out")
    assert iterabre("export", copied, *arguments).exit_code == 0


def test_export_needs_nothing_of_the_campaign_but_its_run_and_model(
    place: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("an export plans nothing")

    monkeypatch.setattr("orchestrator.planning.planner.build_plan", fail)
    monkeypatch.setattr("actors.data.text.describe_text", fail)
    monkeypatch.chdir(tmp_path)
    needed = [place / name for name in ("campaign.yaml", "text.txt", "runs")]
    for file in needed:
        file.rename(file.with_suffix(".gone"))
    try:
        answer = iterabre("export", copied, "--trajectory", TRAJECTORY, "--iteration", 2, "--output", "out")
    finally:
        for file in needed:
            file.with_suffix(".gone").rename(file)
    assert answer.exit_code == 0, answer.err
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    campaign = AutoModelForCausalLM.from_pretrained(copied / f"models/{TRAJECTORY}/2-layers").state_dict()
    assert all(torch.equal(exported[name], campaign[name]) for name in campaign)


def test_a_run_of_an_earlier_version_is_exported_after_a_resume(
    copied: Path, config: str, tmp_path: Path
) -> None:
    (copied / f"trajectories/{TRAJECTORY}.plan.json").unlink()
    arguments = ("export", copied, "--trajectory", TRAJECTORY, "--iteration", 1, "--output", tmp_path / "out")
    answer = iterabre(*arguments)
    assert answer.exit_code == 2
    assert f"holds no plan of {TRAJECTORY}" in answer.err
    assert "give the campaign's command again with --resume" in answer.err
    before = _times(copied)
    assert _resume(config, copied).exit_code == 0
    assert _times(copied) == before
    assert iterabre(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("trajectory", "iteration", "message"),
    [
        ("llama--iterabre--seed1", 1, "unknown trajectory 'llama--iterabre--seed1'; did you mean llama--it"),
        (TRAJECTORY, 3, "has iterations 1 to 2, not 3"),
    ],
)
def test_wrong_exports_are_reported(
    run: Path, tmp_path: Path, trajectory: str, iteration: int, message: str
) -> None:
    output = tmp_path / "out"
    answer = iterabre("export", run, "--trajectory", trajectory, "--iteration", iteration, "--output", output)
    assert (answer.exit_code, answer.out) == (2, "")
    assert message in answer.err
    assert not output.exists()


def test_export_of_an_unfinished_iteration_is_reported(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "stages/recover")
    output = tmp_path / "out"
    answer = iterabre("export", copied, "--trajectory", TRAJECTORY, "--iteration", 1, "--output", output)
    assert answer.exit_code == 2
    assert "recover stage is not finished; continue the run with --resume first" in answer.err
    assert not output.exists()


def test_a_failed_trajectory_is_reported_and_does_not_stop_the_others(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["targets"] = [{"layers": 3}]
    method = campaign["methods"][0]
    explosive = {**method["recovery"], "learning_rate": 1e30, "max_grad_norm": 1e30}
    campaign["methods"] = [{**method, "name": "explosive", "recovery": explosive}, method]
    answer = iterabre("campaign", write_campaign(campaign, tmp_path / "c.yaml"))
    assert answer.exit_code == 1
    assert "failed: llama--explosive--seed0:" in answer.err
    assert (tmp_path / f"runs/tiny/models/{TRAJECTORY}/3-layers/config.json").is_file()
    assert not (tmp_path / "runs/tiny/models/llama--explosive--seed0").exists()
    reported = iterabre("status", tmp_path / "runs/tiny").err
    assert "failed: llama--explosive--seed0:" in reported
    assert TRAJECTORY not in reported
    statuses = json.loads(iterabre("status", tmp_path / "runs/tiny", "--json").out)["outcomes"]
    failed = statuses["llama--explosive--seed0"]
    assert (failed["state"], statuses[TRAJECTORY]["state"]) == ("failed", "done")
    assert failed["reason"] in reported


def test_a_limit_ends_the_campaign_and_a_higher_one_lets_it_go_on(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["targets"] = [{"layers": 3}]
    method = campaign["methods"][0]
    explosive = {**method["recovery"], "learning_rate": 1e30, "max_grad_norm": 1e30}
    campaign["methods"] = [{**method, "name": "explosive", "recovery": explosive}, method]
    file = write_campaign(campaign, tmp_path / "c.yaml")
    answer = iterabre("campaign", file, "--set", "execution.max_failures=1")
    assert answer.exit_code == 1
    assert "ended early: 1 trajectories failed (execution.max_failures: 1)" in answer.err
    assert not (tmp_path / f"runs/tiny/models/{TRAJECTORY}").exists()
    assert iterabre("campaign", file, "--resume", "--set", "execution.max_failures=2").exit_code == 1
    assert (tmp_path / f"runs/tiny/models/{TRAJECTORY}/3-layers/config.json").is_file()
    spent = iterabre("campaign", file, "--resume", "--set", "execution.budget=1e-9")
    assert "is spent (execution.budget: 1e-09)" in spent.err


def test_recovery_none_leaves_the_pruned_model(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["targets"] = [{"layers": 2}]
    campaign["methods"][0]["recovery"] |= {"objective": "none"}
    campaign["methods"][0]["schedule"] = {"mode": "direct"}
    answer = iterabre("compress", write_campaign(campaign, tmp_path / "c.yaml"))
    assert answer.exit_code == 0, answer.err
    (line,) = json.loads(iterabre("status", tmp_path / "runs/tiny", "--json").out)["iterations"][1:]
    assert line["fox/token_perplexity"] == line["fox/token_perplexity_before_recovery"]
    assert len(line["dropped"]) == 2
