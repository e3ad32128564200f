"""Several runs in one report: what they have in common has one name, what they do not has two."""

from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc

from orchestrator.cli.runs import short_names
from orchestrator.reporting.data.comparisons import entries
from orchestrator.reporting.data.measured import DENSE, RECOVERED, measured_models
from orchestrator.reporting.html import build_report
from orchestrator.reporting.joined_runs import join_sources
from orchestrator.reporting.run_source import Source
from tests.unit.reporting.sample_run import sample_ledger


def _run(place: Path, *methods: str, sha: str = "1") -> Source:
    trajectories = tuple(f"smol--{method}--seed0" for method in methods)
    return Source(
        sample_ledger(str(place), trajectories),
        {"name": place.name, "models": [{"id": "smol"}], "methods": [{"name": name} for name in methods]},
        planned=dict.fromkeys(trajectories, 3),
        failures={"smol--broken--seed0": "no memory"},
        hashes={"model smol": sha},
        exports={(trajectory, 7): f"{place}/models/{trajectory}/7-layers" for trajectory in trajectories},
    )


def test_methods_of_both_runs_are_told_apart_and_the_unpruned_model_is_one(tmp_path: Path) -> None:
    joined = join_sources({"one": _run(tmp_path / "one", "a", "b"), "two": _run(tmp_path / "two", "b", "c")})
    found = entries(measured_models(joined.ledger))
    assert {entry.method for entry in found if entry.phase == RECOVERED} == {"a", "b (one)", "b (two)", "c"}
    assert [entry.model for entry in found if entry.phase == DENSE] == ["smol"]
    assert [method["name"] for method in joined.config["methods"]] == ["a", "b (one)", "b (two)", "c"]
    assert joined.planned == {
        f"{run}: smol--{m}--seed0": 3 for run, m in (("one", "a"), ("one", "b"), ("two", "b"), ("two", "c"))
    }
    assert list(joined.failures) == ["one: smol--broken--seed0", "two: smol--broken--seed0"]
    assert joined.exports["two: smol--c--seed0", 7] == f"{tmp_path}/two/models/smol--c--seed0/7-layers"
    assert joined.notes == []


def test_methods_of_one_name_follow_one_another(tmp_path: Path) -> None:
    """Where the other run lists a method that it left out, the one that was measured keeps its place."""
    first, second = _run(tmp_path / "one", "a", "b"), _run(tmp_path / "two", "c", "a")
    second = replace(second, config={**second.config, "methods": [{"name": name} for name in "cbax"]})
    joined = join_sources({"one": first, "two": second})
    assert [method["name"] for method in joined.config["methods"]] == ["a (one)", "a (two)", "b", "c"]


def test_another_model_under_the_same_id_has_its_own_name(tmp_path: Path) -> None:
    joined = join_sources({"one": _run(tmp_path / "one", "a"), "two": _run(tmp_path / "two", "c", sha="2")})
    assert {entry.model for entry in entries(measured_models(joined.ledger))} == {"smol (one)", "smol (two)"}
    assert "smol is not the same model in all runs" in joined.notes[0]


def test_runs_that_measured_otherwise_are_told_apart(tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one", "a"), _run(tmp_path / "two", "c")
    perplexity = pc.equal(two.ledger["metric"], "wikitext2/token_perplexity")
    values = pc.if_else(perplexity, pc.multiply(two.ledger["value"], 2.0), two.ledger["value"])
    place = two.ledger.schema.get_field_index("value")
    shorter = Source(two.ledger.set_column(place, two.ledger.schema.field("value"), values), two.config)
    (note,) = join_sources({"one": Source(one.ledger, one.config), "two": shorter}).notes
    assert note.endswith("unpruned, smol has WikiText-2 perplexity 29 in one, 58 in two")


def test_the_page_has_both_and_no_link_into_one_run(tmp_path: Path) -> None:
    joined = join_sources({"one": _run(tmp_path / "one", "a"), "two": _run(tmp_path / "two", "c")})
    page = build_report(replace(joined, stages=None), tmp_path / "report").read_text()
    assert "<h1>one and two</h1>" in page
    assert "../stages" not in page
    assert "from_pretrained" in page


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["x/demo", "y/demo"]) == ["x/demo", "y/demo"]
    assert short_names(["demo", "/runs/demo"]) == ["demo", "runs/demo"]
