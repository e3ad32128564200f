"""Which models a run still has to measure."""

from pathlib import Path

import pyarrow as pa
import pytest

from orchestrator.reporting.data.due import Due, due_models
from orchestrator.reporting.data.measured import measured_models
from tests.unit.reporting.sample_run import sample_ledger

PLANNED = [
    {"trajectory": f"smol--{method}--seed0", "model": "smol", "method": method, "depths": [9, 8, 7]}
    for method in "ab"
]


@pytest.fixture
def ledger(tmp_path: Path) -> pa.Table:
    """Method a is finished; of b, the second iteration is pruned, and b has not gone further."""
    whole = sample_ledger(str(tmp_path), ("smol--a--seed0", "smol--b--seed0"))
    field = pa.compute.field
    recovering = (field("iteration") == 2) & (
        field("phase").isin(["recovered"]) | (field("stage") == "export")
    )
    return whole.filter((field("method") == "a") | ~((field("iteration") == 3) | recovering))


def test_a_planned_model_is_due_until_it_is_measured_after_recovery(ledger: pa.Table) -> None:
    due = due_models(ledger, measured_models(ledger), PLANNED)
    assert due == [Due("smol", "b", 8, True, False), Due("smol", "b", 7, False, False)]


def test_without_a_plan_what_is_pruned_is_due(ledger: pa.Table) -> None:
    assert due_models(ledger, measured_models(ledger)) == [Due("smol", "b", 8, True, False)]


def test_a_trajectory_that_ended_leaves_nothing_to_wait_for(ledger: pa.Table) -> None:
    due = due_models(ledger, measured_models(ledger), PLANNED, ["smol--b--seed0"])
    assert [one.ended for one in due] == [True, True]
