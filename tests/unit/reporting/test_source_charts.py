"""Figures of one source, on ledgers small enough to say what they must show."""

from pathlib import Path

from orchestrator.reporting.charts.charts import Chart, HeatMap
from orchestrator.reporting.charts.source_charts import source_figures, sweep_figures
from orchestrator.reporting.data.comparisons import entries
from orchestrator.reporting.data.measured import measured_models
from orchestrator.storage.ledger import Ledger, Row
from tests.unit.reporting.sample_run import DROPPED, NUM_LAYERS, sample_ledger

# Angular distance of each start; where no run of two begins, the largest there is.
DISTANCES = {1: (0.5, 0.2, 0.3), 2: (0.6, 0.4, 1.0)}


def test_distances_over_runs_have_a_row_a_length(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    for size, distances in DISTANCES.items():
        place = {"campaign": "c", "trajectory": f"t{size}", "model": "smol", "method": "gromov", "seed": 0}
        common = place | {"iteration": 1, "key": f"k{size}"}
        rows = [
            Row(**common, stage="score", metric="score", value=value, layer=layer)  # type: ignore[arg-type]
            for layer, value in enumerate(distances)
        ]
        rows += [
            Row(**common, stage="prune", metric="dropped", value=0.0, layer=1 + i)  # type: ignore[arg-type]
            for i in range(size)
        ]
        ledger.append(f"t{size}", rows)
    figures = source_figures("smol", ledger.read(), [], ["gromov"], {"gromov": "angular_block"})
    found = {figure.name: figure.panels[0] for figure in figures}
    assert "criteria-smol" not in found
    panel = found["angular-smol"]
    assert isinstance(panel, HeatMap)
    assert (panel.x, panel.y) == ((0, 1, 2), (2, 1))
    assert panel.values[0] == (1.0, 0.0, None)
    assert panel.values[1][:2] == (1.0, 0.0)
    assert panel.marked == ((1, 2), (1, 1))


def test_bounds_are_a_curve_of_their_own(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    common = {"campaign": "c", "trajectory": "t", "model": "smol", "method": "m", "seed": 0}
    common |= {"iteration": 1, "key": "k", "stage": "score"}
    values = {0: ("score_bound", 0.7), 1: ("score", 0.9), 2: ("score_bound", 0.8)}
    rows = [
        Row(**common, metric=metric, value=value, layer=layer)  # type: ignore[arg-type]
        for layer, (metric, value) in values.items()
    ]
    ledger.append("t", rows)
    (drawn,) = source_figures("smol", ledger.read(), [], ["m"], {"m": "hidden_cosine"})
    (panel,) = drawn.panels
    assert isinstance(panel, Chart)
    assert [(curve.name, curve.x, curve.y) for curve in panel.curves] == [
        ("score", (1,), (0.9,)),
        ("score bound", (0, 2), (0.7, 0.8)),
    ]


def test_the_map_of_dropped_layers_has_a_column_for_every_layer(tmp_path: Path) -> None:
    ledger = sample_ledger(str(tmp_path))
    figures = source_figures("smol", ledger, entries(measured_models(ledger)), ["iterabre"], {})
    (panel,) = next(figure for figure in figures if figure.name == "dropped-smol").panels
    assert isinstance(panel, HeatMap)
    assert panel.x == tuple(range(NUM_LAYERS))
    went = {layer: removed for layer, removed in zip(panel.x, panel.values[0], strict=True) if removed}
    assert went == {layer: i for i, layer in enumerate(DROPPED, 1)}


def test_a_sweep_has_a_panel_a_metric() -> None:
    sweep = {
        "model": "some/smol",
        "layers": [1, 2],
        "dense": {"arithmetic/top1": 0.5},
        "metrics": {"arithmetic/top1": [0.4, 0.3]},
        "units": {"arithmetic/top1": ""},
    }
    (figure,) = sweep_figures([sweep])
    (panel,) = figure.panels
    assert isinstance(panel, Chart)
    assert [curve.y for curve in panel.curves] == [(0.4, 0.3), (0.5, 0.5)]
