"""Writing the model of any finished iteration of a run."""

from pathlib import Path

from actors.contracts import ExportResult, ExportSpec, ModelRef
from actors.models import export_model
from orchestrator.export.description import describe_export
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store


def export_iteration(
    store: Store,
    plan: TrajectoryPlan,
    iteration: int,
    model: ModelRef,
    directory: Path,
    repo: str | None = None,
) -> ExportResult:
    """Write `model`, the recovered one of an iteration of `plan`, with card and provenance to `directory`.

    Args:
        repo: of the hub, which the directory is to be uploaded to.
    """
    done = plan.iterations[iteration - 1]
    rows = Ledger(store.ledger_uri).read(f"{plan.id}-").to_pylist()
    uri = str(directory.resolve())
    result = export_model(ExportSpec(model), uri)
    describe_export(uri, plan, done, model, rows, result, repo)
    return result
