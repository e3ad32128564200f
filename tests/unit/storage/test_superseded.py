"""Parts of the ledger that other stages take the place of."""

import pytest

from orchestrator.storage.ledger import Ledger, Row
from orchestrator.storage.stage_store import Store
from orchestrator.storage.superseded import move_superseded, paid_rows, superseded_parts

PARTS = [
    "t-000-evaluate-dense-aaaa",
    "t-001-score-all-aaaa",
    "t-001-prune-all-aaaa",
    "t-001-evaluate-pruned-aaaa",
    "t-001-recover-all-aaaa",
    "t-001-evaluate-recovered-aaaa",
    "t-001-evaluate-recovered-bbbb",
    "t-001-export-all-aaaa",
    "t-002-score-all-aaaa",
    "t-002-recover-all-aaaa",
]
OTHERS = ["t--3L-001-score-all-aaaa", "t2-001-score-all-aaaa", "u-t-001-score-all-aaaa"]


@pytest.mark.parametrize(
    ("slot", "keys", "wanted"),
    [
        ((1, "score", "all"), ["aaaa1"], []),
        ((3, "score", "all"), ["cccc1"], []),
        ((0, "evaluate", "dense"), ["cccc1"], ["t-000-evaluate-dense-aaaa"]),
        ((1, "evaluate", "recovered"), ["aaaa1", "bbbb1"], []),
        ((1, "evaluate", "recovered"), ["bbbb1", "cccc1"], ["t-001-evaluate-recovered-aaaa"]),
        ((1, "export", "all"), ["cccc1"], ["t-001-export-all-aaaa"]),
        # What is before a recovery stays; what follows from it goes.
        ((1, "recover", "all"), ["cccc1"], list(PARTS[4:])),
        ((1, "recover", "all"), [], list(PARTS[4:])),
        ((1, "score", "all"), ["cccc1"], list(PARTS[1:])),
        ((2, "score", "all"), ["cccc1"], ["t-002-score-all-aaaa", "t-002-recover-all-aaaa"]),
    ],
)
def test_what_another_stage_takes_the_place_of(
    slot: tuple[int, str, str], keys: list[str], wanted: list[str]
) -> None:
    assert superseded_parts([*PARTS, *OTHERS], "t", slot, keys) == wanted


def test_they_are_moved_beside_the_ledger(tmp_path: object) -> None:
    store = Store(f"{tmp_path}/run")
    ledger = Ledger(store.ledger_uri)
    row = Row(
        campaign="c", trajectory="t", model="m", method="i", seed=0, iteration=1, stage="score", key="k",
        metric="seconds", value=3.0,
    )  # fmt: skip
    for name in ("t-001-score-all-aaaa", "t-001-score-all-bbbb"):
        ledger.append(name, [row])
    for _ in range(2):
        move_superseded(store, ["t-001-score-all-aaaa"])
    assert ledger.parts() == ["t-001-score-all-bbbb"]
    assert Ledger(store.superseded_uri).read()["value"].to_pylist() == [3.0]
    assert ledger.read_parts(["t-001-score-all-aaaa", "t-001-score-all-bbbb"]).num_rows == 1
    assert paid_rows(store)["value"].to_pylist() == [3.0, 3.0]
