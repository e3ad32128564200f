"""The iteration table says what the ledger says."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from orchestrator.reporting.data.measured import Number
from orchestrator.reporting.tables.tables import (
    before,
    iteration_table,
    latex,
    markdown,
    metric_columns,
    show,
)
from orchestrator.storage.ledger import SCHEMA, Ledger, Row
from tests.unit.reporting.sample_run import sample_ledger


def test_one_line_per_iteration(tmp_path: Path) -> None:
    lines = iteration_table(sample_ledger(str(tmp_path)))
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert [line["layers"] for line in lines] == [10, 9, 8, 7]
    assert [line["dropped"] for line in lines] == [None, (7,), (4,), (8,)]
    second = lines[2]
    assert second["dropped score"] == pytest.approx((0.92,))
    assert second["parameters"] == 134_515_008 - 2 * 3_540_096
    assert second["wikitext2/token_perplexity before recovery"] == pytest.approx(29 * 1.6**2)
    assert second["wikitext2/token_perplexity"] == pytest.approx(29 * 1.25**2)
    assert second["blimp_sample/acc"] == pytest.approx(0.72)
    assert second["evaluate s"] == 80
    assert lines[0]["wikitext2/token_perplexity"] == 29
    assert lines[0]["recover s"] is None


def test_keys_are_the_same_in_every_line(tmp_path: Path) -> None:
    lines = iteration_table(sample_ledger(str(tmp_path), ("b", "a")))
    assert len({tuple(line) for line in lines}) == 1
    assert metric_columns(lines) == [
        "wikitext2/token_perplexity before recovery",
        "wikitext2/token_perplexity",
        "blimp_sample/acc before recovery",
        "blimp_sample/acc",
    ]


def test_what_was_measured_before_recovery_never_stands_for_the_recovered_model(tmp_path: Path) -> None:
    source = {"campaign": "c", "trajectory": "t", "model": "m", "method": "x", "seed": 0, "key": "k"}
    measured = {"blimp/acc": 0.5, "text/token_perplexity": 40.0, "text/loss_nats": 3.7}
    rows = [
        Row(**source, iteration=1, stage="evaluate", phase="pruned", metric=name, value=value)  # type: ignore[arg-type]
        for name, value in measured.items()
    ]
    ledger = Ledger(str(tmp_path))
    ledger.append("1-evaluate-pruned", rows)
    (line,) = iteration_table(ledger.read())
    assert line["phase"] == "pruned"
    assert {name: line[name] for name in measured} == dict.fromkeys(measured)
    assert {name: line[before(name)] for name in measured} == measured
    recovered = [replace(row, phase="recovered", value=row.value / 2) for row in rows]
    ledger.append("1-evaluate-recovered", recovered)
    (line,) = iteration_table(ledger.read())
    assert line["phase"] == "recovered"
    assert {name: line[name] for name in measured} == {name: value / 2 for name, value in measured.items()}
    assert {name: line[before(name)] for name in measured} == measured


def test_waiting_for_room_is_no_metric(tmp_path: Path) -> None:
    ledger = sample_ledger(str(tmp_path))
    (row, *_) = ledger.filter(pc.field("metric") == "seconds").to_pylist()
    waited = pa.Table.from_pylist([{**row, "metric": "waited_s", "stage": "evaluate"}], schema=ledger.schema)
    assert metric_columns(iteration_table(pa.concat_tables([ledger, waited]))) == metric_columns(
        iteration_table(ledger)
    )


def test_empty_ledger_gives_empty_tables() -> None:
    assert iteration_table(SCHEMA.empty_table()) == []
    assert markdown([]) == latex([]) == ""


def test_markdown_and_latex() -> None:
    lines = [{"trajectory": "a_b", "dropped": (3, 4), "value": None}]
    assert markdown(lines) == "| trajectory | dropped | value |\n|---|---|---|\n| a_b | 3, 4 | – |\n"
    assert r"a\_b & 3, 4 & -- \\" in latex(lines)


def test_markdown_and_latex_keep_what_is_best_what_is_alike_and_the_errors() -> None:
    lines = [
        {"method": name, "boolq/acc": Number(value, 0.012, "")} for name, value in (("a", 0.6), ("b", 0.59))
    ]
    marks = ({(0, "boolq/acc")}, {(1, "boolq/acc")})
    assert markdown(lines, *marks).splitlines() == [
        "| method | BoolQ ↑ |", "|---|---|", "| a | **0.6 ± 0.012** |", "| b | ≈ 0.59 ± 0.012 |",
    ]  # fmt: skip
    text = latex(lines, *marks)
    assert r"method & BoolQ $\uparrow$ \\" in text
    assert r"a & \textbf{0.6 $\pm$ 0.012} \\" in text
    assert r"b & $\approx$ 0.59 $\pm$ 0.012 \\" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (134_515_008, "134,515,008"),
        (12345.6, "12,346"),
        (29.04567, "29.05"),
        (1.5e-5, "1.5e-05"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ((0.96, 0.5), "0.96, 0.5"),
        ("smol", "smol"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert show(value) == text
