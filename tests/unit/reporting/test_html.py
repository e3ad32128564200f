"""The report shows the ledger's numbers and needs no network."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from orchestrator.reporting.charts.charts import MOST_POINTS, Chart, Curve, Figure, HeatMap, thinned
from orchestrator.reporting.charts.figures import COLOURS, GREY, SEQUENCE
from orchestrator.reporting.charts.method_charts import method_figures
from orchestrator.reporting.charts.source_charts import source_figures
from orchestrator.reporting.data.comparisons import entries
from orchestrator.reporting.data.measured import measured_models
from orchestrator.reporting.html import build_report, in_order_of
from orchestrator.reporting.run_source import Source
from orchestrator.reporting.tables.summary import of_method
from orchestrator.storage.ledger import SCHEMA
from tests.unit.reporting.sample_run import DROPPED, sample_ledger

PNG_MAGIC = b"\x89PNG"


@pytest.fixture
def ledger(tmp_path: Path) -> pa.Table:
    return sample_ledger(str(tmp_path / "ledger"))


def _figures(ledger: pa.Table) -> dict[str, Figure]:
    return {figure.name: figure for figure in method_figures(ledger, measured_models(ledger))}


def _chart(figure: Figure) -> Chart:
    panel = figure.panels[0]
    assert isinstance(panel, Chart)
    return panel


def _without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_page_is_self_contained(ledger: pa.Table, tmp_path: Path) -> None:
    """Nothing is fetched; the only links out of the page lead into the run beside it."""
    page = build_report(Source(ledger, {"name": "demo"}), tmp_path / "out").read_text()
    assert (
        re.findall(r'(?:src|href)="(?!#|data:|\.\./stages/|tables/|figures/)[^"]*"', _without_scripts(page))
        == []
    )
    assert re.findall(r"<script[^>]*\ssrc=", page) == []
    assert "@import" not in _without_scripts(page)
    assert "plotly.js v" in page


def test_page_shows_table_configuration_and_versions(ledger: pa.Table, tmp_path: Path) -> None:
    config = {"name": "<demo>", "methods": [{"name": "iterabre"}]}
    page = _without_scripts(build_report(Source(ledger, config, {"torch": "2.13.0"}), tmp_path).read_text())
    for text in (">56.64<", ">118.8<", "&lt;demo&gt;", "- name: iterabre", "<td>2.13.0</td>"):
        assert text in page
    assert "10 → 7 layers (30% removed)" in page
    assert "7 of 10 layers by <strong>iterabre</strong>" in page
    assert "the WikiText-2 perplexity, 29 → 56.64" in page
    assert '<abbr title="wikitext2/token_perplexity – ' in page


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
    for figure in ("performance", "changes", "layer-scores", "recovery-loss", "cost"):
        assert {f"smol--iterabre-{figure}.png", f"smol--iterabre-{figure}.svg"} <= names
    assert (tmp_path / "figures/smol--iterabre-cost.png").read_bytes()[:4] == PNG_MAGIC
    assert "<svg" in (tmp_path / "figures/smol--iterabre-cost.svg").read_text()[:2000]
    tables = tmp_path / "tables"
    assert (tables / "methods.md").read_text().startswith("| model | method |")
    assert (tables / "methods.tex").read_text().startswith(r"\begin{tabular}")
    assert "smol,iterabre,7" in (tables / "methods.csv").read_text()
    assert (tables / "iterations-smol--iterabre.csv").exists()


def test_methods_are_compared_over_the_share_removed(tmp_path: Path) -> None:
    trajectories = ("smol--a--seed0", "smol--b--seed0")
    page = build_report(Source(sample_ledger(str(tmp_path / "ledger"), trajectories)), tmp_path).read_text()
    assert "methods over the share removed" in page
    assert (tmp_path / "figures/all-compare-smol.png").exists()


def test_a_run_under_way_says_how_far_it_is(ledger: pa.Table, tmp_path: Path) -> None:
    planned = {"smol-iterabre-s0": 6}
    page = build_report(Source(ledger, planned=planned), tmp_path).read_text()
    assert "3 of 6 models are measured (50 %)" in page
    at_targets = {"model": "smol", "method": "iterabre", "depths": [9, 8, 7]}
    both = Source(ledger, planned=planned, trajectories=[{"trajectory": "smol-iterabre-s0", **at_targets}])
    assert "under way" not in _without_scripts(build_report(both, tmp_path).read_text())
    done = build_report(Source(ledger, planned={"smol-iterabre-s0": 3}), tmp_path).read_text()
    assert "under way" not in _without_scripts(done)
    assert ("so far" in _without_scripts(page), "so far" in _without_scripts(done)) == (True, False)
    failed = Source(ledger, failures={"other": "no <place>"})
    assert "other failed: no &lt;place&gt;" in build_report(failed, tmp_path).read_text()


def test_a_method_that_is_still_recovering_keeps_the_page_from_recommending(tmp_path: Path) -> None:
    whole = sample_ledger(str(tmp_path / "ledger"), ("smol--a--seed0", "smol--b--seed0"))
    field = pa.compute.field
    last = (field("trajectory") == "smol--b--seed0") & (field("iteration") == 3)
    under_way = whole.filter(~(last & (field("phase").isin(["recovered"]) | (field("stage") == "export"))))
    page = _without_scripts(build_report(Source(under_way), tmp_path / "out").read_text())
    assert "8 of 10 layers by <strong>a</strong>" in page
    assert "No choice yet: b is not measured yet; by WikiText-2 perplexity: a (56.64)." in page
    rows = (tmp_path / "out/tables/iterations-smol--b.csv").read_text().splitlines()
    cells = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert (cells["iteration"], cells["phase"], cells["blimp_sample/acc"]) == ("3", "pruned", "")
    assert cells["blimp_sample/acc before recovery"] == "0.6"


def test_charts_hold_the_numbers_of_the_ledger(ledger: pa.Table) -> None:
    figures = _figures(ledger)
    perplexity, accuracy = figures["performance"].panels
    assert isinstance(perplexity, Chart)
    assert isinstance(accuracy, Chart)
    before, after, dense = perplexity.curves
    assert before.y == pytest.approx([29 * 1.6**i for i in (1, 2, 3)])
    assert after.y == pytest.approx([29 * 1.25**i for i in (1, 2, 3)])
    assert (dense.y, dense.dashed) == ((29, 29), True)
    assert accuracy.curves[1].stderr == (0.012,) * 3
    assert [len(curve.x) for curve in _chart(figures["recovery-loss"]).curves] == [80] * 3
    (scores,) = figures["layer-scores"].panels
    assert isinstance(scores, HeatMap)
    assert scores.marked == tuple(zip(DROPPED, (1, 2, 3), strict=True))
    assert [[x for x, v in zip(scores.x, row, strict=True) if v is None] for row in scores.values] == [
        [],
        [7],
        [4, 7],
    ]


def test_changes_add_up_to_the_way_from_the_unpruned_model(ledger: pa.Table) -> None:
    pruning, recovery = _chart(_figures(ledger)["changes"]).curves
    assert pruning.x == recovery.x == ("1: 7", "2: 4", "3: 8")
    assert 29 + sum(pruning.y) + sum(recovery.y) == pytest.approx(29 * 1.25**3)


def test_cost_has_every_stage_once(ledger: pa.Table) -> None:
    curves = _chart(_figures(ledger)["cost"]).curves
    seconds = {curve.name: dict(zip(curve.x, curve.y, strict=True)) for curve in curves}
    assert seconds["recover"] == {1: 100, 2: 100, 3: 100}
    assert seconds["evaluate"] == {0: 40, 1: 80, 2: 80, 3: 80}


def test_long_curves_are_thinned_to_means() -> None:
    count = 10 * MOST_POINTS
    curve = thinned(Curve("loss", tuple(range(count)), tuple(float(i) for i in range(count))))
    assert len(curve.x) == MOST_POINTS
    assert curve.y[:2] == pytest.approx((4.5, 14.5))
    assert sum(curve.y) / len(curve.y) == pytest.approx((count - 1) / 2)


def test_unfinished_runs_have_a_report(ledger: pa.Table, tmp_path: Path) -> None:
    empty = build_report(Source(SCHEMA.empty_table()), tmp_path)
    assert "Nothing has been measured yet" in empty.read_text()
    dense = ledger.filter(pa.compute.field("iteration") == 0)
    assert of_method(entries(measured_models(dense))).startswith("Only the unpruned model")
    assert build_report(Source(dense), tmp_path).exists()
    scored = ledger.filter(pa.compute.field("stage") == "score")
    assert build_report(Source(scored), tmp_path).exists()


def test_what_holds_nothing_is_left_out(ledger: pa.Table, tmp_path: Path) -> None:
    """One method has no comparison of methods, and one iteration no development over iterations."""
    one_method = _without_scripts(build_report(Source(ledger), tmp_path / "method").read_text())
    assert "methods over the share removed" not in one_method
    assert "Accuracy kept" not in one_method
    first = ledger.filter(pa.compute.field("iteration") <= 1)
    assert {"performance", "changes", "layer-scores"}.isdisjoint(_figures(first))
    assert {"recovery-loss", "cost"} <= _figures(first).keys()
    page = _without_scripts(build_report(Source(first), tmp_path / "depth").read_text())
    assert "Quality against size" not in page
    assert "Configuration" not in page


def test_of_one_depth_methods_are_compared_in_bars_with_errors(tmp_path: Path) -> None:
    ledger = sample_ledger(str(tmp_path), ("smol--a--seed0", "smol--b--seed0"))
    first = ledger.filter(pa.compute.field("iteration") <= 1)
    (compared, *_) = source_figures("smol", first, entries(measured_models(first)), ["a", "b"], {})
    accuracy = compared.panels[1]
    assert isinstance(accuracy, Chart)
    assert (accuracy.kind, accuracy.places) == ("bars", ["unpruned", "a", "b"])
    assert [curve.stderr for curve in accuracy.curves] == [(0.012,), (0.012,) * 2, (0.012,) * 2]


@pytest.mark.parametrize("paper", ["#ffffff", "#14171a"])
def test_every_colour_is_seen_on_light_and_on_dark_paper(paper: str) -> None:
    """A contrast of 3, as WCAG 2.1 asks of graphics (1.4.11)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in (*COLOURS, GREY, *SEQUENCE):
        dark, light = sorted((luminance(colour) + 0.05, luminance(paper) + 0.05))
        assert light / dark >= 3, colour


def test_methods_come_in_the_order_of_the_configuration(tmp_path: Path) -> None:
    models = measured_models(sample_ledger(str(tmp_path), ("smol--a--s", "smol--b--s")))
    config = {"models": [{"id": "smol"}], "methods": [{"name": "b"}, {"name": "a"}]}
    assert list(dict.fromkeys(m.method for m in in_order_of(config, models))) == ["b", "a"]
