"""The report shows the ledger's numbers and needs no network."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from orchestrator.ledger import SCHEMA
from orchestrator.report.charts import Chart, HeatMap, trajectory_charts
from orchestrator.report.html import build_report, summary
from orchestrator.report.tables import iteration_table
from tests.unit.orchestrator.report.sample_run import DROPPED, sample_ledger

PNG_MAGIC = b"\x89PNG"


@pytest.fixture
def ledger(tmp_path: Path) -> pa.Table:
    return sample_ledger(str(tmp_path / "ledger"))


def _without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_page_is_self_contained(ledger: pa.Table, tmp_path: Path) -> None:
    page = build_report(ledger, {"name": "demo"}, tmp_path / "out").read_text()
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', _without_scripts(page)) == []
    assert re.findall(r"<script[^>]*\ssrc=", page) == []
    assert "@import" not in _without_scripts(page)
    assert "plotly.js v" in page


def test_page_shows_table_configuration_and_versions(ledger: pa.Table, tmp_path: Path) -> None:
    config = {"name": "<demo>", "methods": [{"name": "iterabre"}]}
    page = _without_scripts(build_report(ledger, config, tmp_path, {"torch": "2.13.0"}).read_text())
    for text in ("<td>56.64</td>", "<td>118.8</td>", "&lt;demo&gt;", "- name: iterabre", "<td>2.13.0</td>"):
        assert text in page
    assert "10 → 7 layers (30% removed)" in page


def test_figures_are_written_for_documents(ledger: pa.Table, tmp_path: Path) -> None:
    build_report(ledger, {}, tmp_path)
    figures = {path.stem: path.read_bytes()[:4] for path in (tmp_path / "figures").iterdir()}
    names = ("accuracy", "layer-scores", "recovery-loss", "wikitext2-token_perplexity")
    assert figures == {f"smol-iterabre-s0-{name}": PNG_MAGIC for name in names}
    assert (tmp_path / "iterations.md").read_text().startswith("| trajectory |")
    assert (tmp_path / "iterations.tex").read_text().startswith(r"\begin{tabular}")


def test_several_trajectories_are_compared(tmp_path: Path) -> None:
    page = build_report(sample_ledger(str(tmp_path / "ledger"), ("a", "b")), {}, tmp_path).read_text()
    assert "Trajectories compared" in page
    assert (tmp_path / "figures/all-compare-blimp_sample-acc.png").exists()


def test_charts_hold_the_numbers_of_the_ledger(ledger: pa.Table) -> None:
    charts = {chart.name: chart for chart in trajectory_charts(ledger, iteration_table(ledger))}
    before, after, dense = charts["wikitext2/token_perplexity"].curves
    assert before.y == pytest.approx([29 * 1.6**i for i in (1, 2, 3)])
    assert after.y == pytest.approx([29 * 1.25**i for i in (1, 2, 3)])
    assert (dense.y, dense.dashed) == ((29, 29), True)
    accuracy = charts["accuracy"]
    assert isinstance(accuracy, Chart)
    assert accuracy.curves[0].stderr == (0.012,) * 4
    assert [len(curve.x) for curve in charts["recovery-loss"].curves] == [80] * 3
    scores = charts["layer-scores"]
    assert isinstance(scores, HeatMap)
    assert scores.marked == tuple(zip(DROPPED, (1, 2, 3), strict=True))
    assert [[x for x, v in zip(scores.x, row, strict=True) if v is None] for row in scores.values] == [
        [],
        [7],
        [4, 7],
    ]


def test_unfinished_runs_have_a_report(ledger: pa.Table, tmp_path: Path) -> None:
    assert "Nothing has been measured yet" in build_report(SCHEMA.empty_table(), {}, tmp_path).read_text()
    dense = ledger.filter(pa.compute.field("iteration") == 0)
    assert summary(iteration_table(dense)).startswith("Only the unpruned model")
    assert build_report(dense, {}, tmp_path).exists()
    scored = ledger.filter(pa.compute.field("stage") == "score")
    assert build_report(scored, {}, tmp_path).exists()
