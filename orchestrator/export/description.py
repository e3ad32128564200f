"""The model card and the provenance beside an exported model: what made it, and what was measured of it.

They are no part of the export's key or payload: another wording, other versions or more numbers leave its
weights as they are.
"""

import json
from collections.abc import Iterable

from actors.artifacts import delete_file, join, list_files, read_bytes, write_bytes
from actors.contracts import ExportResult, ModelRef
from orchestrator.export.model_card import model_card
from orchestrator.export.provenance import LedgerRow, is_of, provenance, with_scores
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.storage.layout import CARD, PROVENANCE


def describe_export(
    uri: str,
    plan: TrajectoryPlan,
    iteration: IterationPlan,
    model: ModelRef,
    rows: Iterable[LedgerRow],
    result: ExportResult,
    address: str | None = None,
) -> None:
    """Write card and provenance beside the export at `uri`, which will also be at `address`.

    One that has them keeps what they say of how it was made; they are written again only if other
    numbers have been measured since. What an export of another model left there is replaced.
    """
    rows = list(rows)
    made = provenance(plan, iteration, model, rows)
    found = read_bytes(join(uri, PROVENANCE))
    if found is not None:
        before = json.loads(found)
        if is_of(before, made):
            renewed = with_scores(before, made)
            if _text(renewed) == _text(before):
                return
            made = renewed
        else:
            _remove_other_weights(uri, result)
    card = model_card(plan, iteration, model, rows, result, address or uri, made["versions"])
    write_bytes(join(uri, CARD), card.encode())
    # Last: an export without it is described anew.
    write_bytes(join(uri, PROVENANCE), _text(made).encode())


def _text(provenance: object) -> str:
    return json.dumps(provenance, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _remove_other_weights(uri: str, result: ExportResult) -> None:
    """Remove weights that the export does not have: readers prefer a single file to shards."""
    names = {file.name for file in result.artifact.files}
    for info in list_files(uri):
        if ".safetensors" in info.base_name and info.base_name not in names:
            delete_file(join(uri, info.base_name))
