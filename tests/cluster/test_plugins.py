"""Rows of another package on a cluster: every node must have the version that the driver has."""

import os
import shutil
from pathlib import Path

import pytest

from actors.errors import WorkError
from actors.plugins import STARTED_WITH, environment
from actors.scoring import find_criterion
from tests.chaos.nodes import LocalCluster
from tests.chaos.nodes import environment as of_its_own
from tests.unit.test_plugins import campaign, command, install, keys

ONCE = ("--set", "targets=[{layers: 3}]")
ON_RAY = (*ONCE, "--set", "execution={backend: ray, scoring: {actors: 1, cpus: 0.5}}")


def test_a_node_without_the_package_says_which_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment() == {STARTED_WITH: '{"criterion": {}, "recovery objective": {}, "probe": {}}'}
    monkeypatch.setenv(STARTED_WITH, '{"criterion": {"largest_weight": "my_pruning 1.0"}}')
    with pytest.raises(WorkError, match=r"no such package; install my_pruning 1.0 on every node"):
        find_criterion("largest_weight")
    assert find_criterion("hidden_cosine").highest_first


@pytest.mark.long
def test_actors_and_train_workers_find_the_package(tmp_path: Path) -> None:
    install(tmp_path / "site")
    file = campaign(tmp_path)
    done = command(tmp_path / "site", "compress", file, *ONCE)
    assert done.returncode == 0, done.stderr
    here = keys(tmp_path / "runs/tiny")
    shutil.rmtree(tmp_path / "runs")
    done = command(tmp_path / "site", "compress", file, *ON_RAY)
    assert done.returncode == 0, done.stderr
    assert keys(tmp_path / "runs/tiny") == here


@pytest.mark.long
def test_a_node_with_another_version_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site")
    install(tmp_path / "node", version="1.1")
    file = campaign(tmp_path)
    path = os.pathsep.join([str(tmp_path / "node"), os.environ.get("PYTHONPATH", "")])
    # A token of its own: Ray would else take the user's, here and there.
    for name, value in of_its_own(tmp_path).items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as at_node:
        at_node.setenv("PYTHONPATH", path)
        cluster = LocalCluster(workers=1)
    try:
        done = command(tmp_path / "site", "compress", file, *ON_RAY, "--address", cluster.address)
    finally:
        cluster.stop()
        cluster.forget()
    reported = " ".join(done.stderr.split())
    assert done.returncode == 1, reported
    assert "is that of my_pruning 1.0 where the campaign was started" in reported
    assert "has my_pruning 1.1; install my_pruning 1.0 on every node, then --resume" in reported
