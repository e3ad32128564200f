"""`cluster.yaml` against Ray's own schema, and what the schema does not check."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_head_takes_no_work_and_gpu_workers_start_from_zero(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head = types[cluster["head_node_type"]]
    workers = [kind for name, kind in types.items() if name != cluster["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert all(kind["min_workers"] == 0 and kind["max_workers"] > 0 for kind in workers)
    assert all(kind["resources"]["GPU"] > 0 for kind in workers)


def test_spot_is_asked_for_before_on_demand(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"].values()
    is_spot = {"InstanceMarketOptions" in kind["node_config"]: kind.get("priority", 0) for kind in types}
    assert is_spot[True] > is_spot[False]


def test_files_it_names_exist(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"] == {"/home/ubuntu/iterabre": "."}
    assert (ROOT / "constraints.txt").is_file()
