"""Rows of another installed package: the one of docs/plugins.md, through a whole campaign."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from actors import plugins
from orchestrator.config import load_config
from orchestrator.planning.planner import build_plan
from orchestrator.storage.ledger import Ledger
from tests.support.tiny_campaign import NUM_LAYERS, tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre

PAGE = (Path(__file__).parents[2] / "docs/plugins.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first block of the page in that language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def install(directory: Path, *, version: str = "1.0", distribution: str = "my_pruning") -> None:
    """Put the page's package into `directory` as an installer does."""
    project = tomllib.loads(block("toml"))["project"]
    directory.mkdir(exist_ok=True)
    (directory / "my_pruning.py").write_text(block("python"))
    info = directory / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


def campaign(directory: Path) -> str:
    """A tiny campaign with the page's criterion, objective and probe."""
    written = tiny_campaign(directory)
    (method,) = written["methods"]
    method["scoring"] = {"criterion": "largest_weight"}
    method["recovery"] |= {"objective": "plain"}
    written["evaluation"]["probes"] = ["greeting"]
    return write_campaign(written, directory / "campaign.yaml")


def command(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`iterabre ARGUMENTS` where `site` is among the places of installed packages."""
    path = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def keys(run: Path) -> set[tuple[str, str]]:
    """Kind and key of every stage of a run."""
    return {(stage.parent.name, stage.name) for stage in run.glob("stages/*/*")}


def test_the_pages_package_decides_recovers_and_measures(tmp_path: Path) -> None:
    install(tmp_path / "site")
    file = campaign(tmp_path)
    done = command(tmp_path / "site", "campaign", file)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/tiny"
    rows = Ledger(str(run / "ledger")).read().to_pylist()
    measured = [row["metric"] for row in rows]
    assert measured.count("greeting/loss") == 5, "unpruned, and pruned and recovered at two depths"
    weights = load_file(tmp_path / "model/model.safetensors")
    largest = [
        max(w.abs().max().item() for name, w in weights.items() if f"layers.{i}." in name and w.dim() == 2)
        for i in range(NUM_LAYERS)
    ]
    first = [row["layer"] for row in rows if (row["metric"], row["iteration"]) == ("dropped", 1)]
    assert first == [largest.index(min(largest))]

    before = keys(run)
    (tmp_path / "site/my_pruning-1.0.dist-info").rename(tmp_path / "gone")
    install(tmp_path / "site", version="1.1")
    assert command(tmp_path / "site", "campaign", file, "--resume").returncode == 0
    added = keys(run) - before
    assert {kind for kind, _ in added} >= {"score", "recover", "evaluate"}, "a new version, new results"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place of installed packages, of this process."""
    place = tmp_path / "site"
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "my_pruning", raising=False)
    plugins.registered.cache_clear()
    yield place
    plugins.registered.cache_clear()
    sys.modules.pop("my_pruning", None)


def test_a_key_names_the_package_only_where_it_decides(site: Path, tmp_path: Path) -> None:
    install(site)
    only_criterion = ["evaluation.probes=[]", "methods.0.recovery.objective=kd"]
    (trajectory,) = build_plan(load_config(campaign(tmp_path), only_criterion)).trajectories
    dense = trajectory.dense
    assert trajectory.key_inputs(trajectory.score_spec(dense))["plugins"] == ["my_pruning 1.0"]
    assert "plugins" not in trajectory.key_inputs(trajectory.recovery_spec(dense))
    assert "plugins" not in trajectory.key_inputs(trajectory.evaluation_spec(dense))


def two_of_a_name(site: Path) -> None:
    install(site)
    install(site, distribution="their_pruning")


def unimportable(site: Path) -> None:
    install(site)
    (site / "my_pruning.py").write_text("import no_such_module\n")


def of_another_version(site: Path) -> None:
    install(site)
    (site / "my_pruning.py").write_text(
        "from actors.scoring import LayerCriterion\nLARGEST = LayerCriterion(since=2)\n"
    )


def no_row(site: Path) -> None:
    install(site)
    (site / "my_pruning.py").write_text("LARGEST = PLAIN = GREETING = 1\n")


def name_of_ours(site: Path) -> None:
    install(site)
    points = site / "my_pruning-1.0.dist-info/entry_points.txt"
    points.write_text("[iterabre.criteria]\nlargest_weight = my_pruning:LARGEST\n")
    points.write_text(points.read_text() + "hidden_cosine = my_pruning:LARGEST\n")


@pytest.mark.parametrize(
    ("prepare", "criterion", "messages"),
    [
        (lambda _: None, "largest_weight", ["unknown criterion 'largest_weight'"]),
        (install, "largest_wait", ["unknown criterion 'largest_wait'", "largest_weight"]),
        (
            two_of_a_name,
            "largest_weight",
            ["my_pruning 1.0 and their_pruning 1.0", "uninstall or rename one"],
        ),
        (unimportable, "largest_weight", ["my_pruning 1.0", "my_pruning:LARGEST", "no_such_module"]),
        (
            of_another_version,
            "largest_weight",
            ["TypeError", "'since'", "install a version that fits"],
        ),
        (no_row, "largest_weight", ["is a int", "register a LayerCriterion"]),
        (name_of_ours, "hidden_cosine", ["this project and my_pruning 1.0"]),
    ],
)
def test_what_cannot_be_used_is_reported(
    prepare: Callable[[Path], None],
    criterion: str,
    messages: list[str],
    site: Path,
    tmp_path: Path,
) -> None:
    prepare(site)
    file = campaign(tmp_path)
    alone = ["evaluation.probes=[]", "methods.0.recovery.objective=kd"]
    settings = [f"methods.0.scoring.criterion={criterion}", *alone]
    answer = iterabre("plan", file, *(part for setting in settings for part in ("--set", setting)))
    assert answer.exit_code == 2, answer.out + answer.err
    reported = " ".join(answer.err.split())
    for message in messages:
        assert message in reported
