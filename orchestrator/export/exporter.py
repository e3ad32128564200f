"""Writing the model of any finished iteration of a run."""

from pathlib import Path

from actors.contracts import ExportResult, ExportSpec, ModelRef
from actors.models import export_model
from orchestrator.export.model_card import model_card
from orchestrator.export.provenance import provenance
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store


def export_iteration(
    store: Store, plan: TrajectoryPlan, iteration: int, model: ModelRef, directory: Path
) -> ExportResult:
    """Write `model`, the recovered one of an iteration of `plan`, to `directory`."""
    done = plan.iterations[iteration - 1]
    rows = Ledger(store.ledger_uri).read(f"{plan.id}-").to_pylist()
    spec = ExportSpec(model, model_card(plan, done, model, rows), provenance(plan, done, model, rows))
    return export_model(spec, str(directory.resolve()))
