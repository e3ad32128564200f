"""The report shows the ledger's numbers and needs no network."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from orchestrator.ledger import SCHEMA
from orchestrator.report.charts import MOST_POINTS, Chart, Curve, HeatMap, thinned
from orchestrator.report.html import Source, build_report, in_order_of
from orchestrator.report.measured import measured_models
from orchestrator.report.summary import of_trajectory
from orchestrator.report.trajectory_charts import trajectory_charts
from tests.unit.orchestrator.report.sample_run import DROPPED, sample_ledger

PNG_MAGIC = b"\x89PNG"


@pytest.fixture
def ledger(tmp_path: Path) -> pa.Table:
    return sample_ledger(str(tmp_path / "ledger"))


def _without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_page_is_self_contained(ledger: pa.Table, tmp_path: Path) -> None:
    """Nothing is fetched; the only links out of the page lead into the run beside it."""
    page = build_report(Source(ledger, {"name": "demo"}), tmp_path / "out").read_text()
    assert re.findall(r'(?:src|href)="(?!#|data:|\.\./stages/)[^"]*"', _without_scripts(page)) == []
    assert re.findall(r"<script[^>]*\ssrc=", page) == []
    assert "@import" not in _without_scripts(page)
    assert "plotly.js v" in page


def test_page_shows_table_configuration_and_versions(ledger: pa.Table, tmp_path: Path) -> None:
    config = {"name": "<demo>", "methods": [{"name": "iterabre"}]}
    page = _without_scripts(build_report(Source(ledger, config, {"torch": "2.13.0"}), tmp_path).read_text())
    for text in (">56.64<", "<td>118.8</td>", "&lt;demo&gt;", "- name: iterabre", "<td>2.13.0</td>"):
        assert text in page
    assert "10 → 7 layers (30% removed)" in page
    assert "smol at 7 of 10 layers" in page


def test_every_measured_number_of_a_comparison_leads_to_its_stage(ledger: pa.Table, tmp_path: Path) -> None:
    page = _without_scripts(build_report(Source(ledger), tmp_path).read_text())
    targets = set(re.findall(r'<a href="#(stage-[^"]+)"', page))
    assert targets
    assert targets <= set(re.findall(r'<tr id="([^"]+)"', page))
    assert 'href="../stages/recover/recover-2-smol-iterabre-s0/manifest.json"' in page
    assert "stages/prune/" not in page


def test_figures_and_tables_are_written_for_documents(ledger: pa.Table, tmp_path: Path) -> None:
    build_report(Source(ledger), tmp_path)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    of_one = ("blimp_sample-acc", "changes-blimp_sample-acc", "layer-scores", "recovery-loss", "cost")
    for figure in of_one:
        assert {f"smol-iterabre-s0-{figure}.png", f"smol-iterabre-s0-{figure}.svg"} <= names
    assert (tmp_path / "figures/smol-iterabre-s0-cost.png").read_bytes()[:4] == PNG_MAGIC
    assert "<svg" in (tmp_path / "figures/smol-iterabre-s0-cost.svg").read_text()[:2000]
    tables = tmp_path / "tables"
    assert (tables / "methods.md").read_text().startswith("| model | method |")
    assert (tables / "methods.tex").read_text().startswith(r"\begin{tabular}")
    assert "smol,iterabre,7" in (tables / "methods.csv").read_text()
    assert (tables / "iterations-smol-iterabre-s0.csv").exists()


def test_methods_are_compared_over_the_share_removed(tmp_path: Path) -> None:
    trajectories = ("smol--a--seed0", "smol--b--seed0")
    page = build_report(Source(sample_ledger(str(tmp_path / "ledger"), trajectories)), tmp_path).read_text()
    assert "Methods over the share removed" in page
    assert (tmp_path / "figures/all-compare-smol-blimp_sample-acc.png").exists()


def test_a_run_under_way_says_how_far_it_is(ledger: pa.Table, tmp_path: Path) -> None:
    planned = {"smol-iterabre-s0": 6}
    page = build_report(Source(ledger, planned=planned), tmp_path).read_text()
    assert "3 of 6 iterations are finished (50 %)" in page
    done = build_report(Source(ledger, planned={"smol-iterabre-s0": 3}), tmp_path).read_text()
    assert "under way" not in _without_scripts(done)
    failed = Source(ledger, failures={"other": "no <place>"})
    assert "other failed: no &lt;place&gt;" in build_report(failed, tmp_path).read_text()


def test_charts_hold_the_numbers_of_the_ledger(ledger: pa.Table) -> None:
    charts = {chart.name: chart for chart in trajectory_charts(ledger, measured_models(ledger))}
    before, after, dense = charts["wikitext2/token_perplexity"].curves
    assert before.y == pytest.approx([29 * 1.6**i for i in (1, 2, 3)])
    assert after.y == pytest.approx([29 * 1.25**i for i in (1, 2, 3)])
    assert (dense.y, dense.dashed) == ((29, 29), True)
    accuracy = charts["blimp_sample/acc"]
    assert isinstance(accuracy, Chart)
    assert accuracy.curves[1].stderr == (0.012,) * 3
    assert [len(curve.x) for curve in charts["recovery-loss"].curves] == [80] * 3
    scores = charts["layer-scores"]
    assert isinstance(scores, HeatMap)
    assert scores.marked == tuple(zip(DROPPED, (1, 2, 3), strict=True))
    assert [[x for x, v in zip(scores.x, row, strict=True) if v is None] for row in scores.values] == [
        [],
        [7],
        [4, 7],
    ]


def test_changes_add_up_to_the_way_from_the_unpruned_model(ledger: pa.Table) -> None:
    charts = {chart.name: chart for chart in trajectory_charts(ledger, measured_models(ledger))}
    pruning, recovery = charts["changes-wikitext2/token_perplexity"].curves
    assert pruning.x == recovery.x == ("1: 7", "2: 4", "3: 8")
    assert 29 + sum(pruning.y) + sum(recovery.y) == pytest.approx(29 * 1.25**3)


def test_cost_has_every_stage_once(ledger: pa.Table) -> None:
    charts = {chart.name: chart for chart in trajectory_charts(ledger, measured_models(ledger))}
    seconds = {curve.name: dict(zip(curve.x, curve.y, strict=True)) for curve in charts["cost"].curves}
    assert seconds["recover"] == {1: 100, 2: 100, 3: 100}
    assert seconds["evaluate"] == {0: 40, 1: 80, 2: 80, 3: 80}


def test_long_curves_are_thinned_to_means() -> None:
    curve = thinned(Curve("loss", tuple(range(1000)), tuple(float(i) for i in range(1000))))
    assert len(curve.x) <= MOST_POINTS
    assert curve.y[0] == pytest.approx(1.5)
    assert sum(curve.y) / len(curve.y) == pytest.approx(499.5)


def test_unfinished_runs_have_a_report(ledger: pa.Table, tmp_path: Path) -> None:
    empty = build_report(Source(SCHEMA.empty_table()), tmp_path)
    assert "Nothing has been measured yet" in empty.read_text()
    dense = ledger.filter(pa.compute.field("iteration") == 0)
    assert of_trajectory(measured_models(dense)).startswith("Only the unpruned model")
    assert build_report(Source(dense), tmp_path).exists()
    scored = ledger.filter(pa.compute.field("stage") == "score")
    assert build_report(Source(scored), tmp_path).exists()


def test_methods_come_in_the_order_of_the_configuration(tmp_path: Path) -> None:
    models = measured_models(sample_ledger(str(tmp_path), ("smol--a--s", "smol--b--s")))
    config = {"models": [{"id": "smol"}], "methods": [{"name": "b"}, {"name": "a"}]}
    assert list(dict.fromkeys(m.method for m in in_order_of(config, models))) == ["b", "a"]
