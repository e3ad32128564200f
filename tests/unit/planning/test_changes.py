"""What a change of a campaign file, or of what it names, means for a run that is there."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.config import CampaignConfig
from orchestrator.planning.changes import Effect, RunRecord, compare, described

CAMPAIGN: dict[str, Any] = {
    "name": "c",
    "models": [{"id": "m", "path": "org/model"}],
    "methods": [{"name": "iterabre", "recovery": {"data": {"path": "text.txt"}}}],
    "targets": [{"layers": 3}],
    "evaluation": {"tasks": ["blimp"]},
}
CONTENTS = {
    ("models", "m"): "a" * 64,
    ("methods", "iterabre", "recovery", "data"): "b" * 64,
    ("evaluation", "perplexity", "wikitext2", "data"): "c" * 64,
}
DEEPSPEED = {"optimizer": {"type": "AdamW"}, "steps_per_print": 5}

Edit = Callable[[dict[str, Any]], object]


def record(raw: dict[str, Any] = CAMPAIGN, **more: Any) -> RunRecord:
    config = CampaignConfig.model_validate(copy.deepcopy(raw)).model_dump(mode="json")
    return replace(RunRecord(config, CONTENTS, DEEPSPEED, {"torch": "2.0"}), **more)


def edited(edit: Edit) -> dict[str, Any]:
    raw = copy.deepcopy(CAMPAIGN)
    edit(raw)
    return raw


def changes(now: RunRecord, recorded: RunRecord | None = None) -> list[tuple[str, str]]:
    return [(change.effect.name, str(change)) for change in compare(recorded or record(), now)]


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (lambda c: c["targets"].append({"fraction": 0.5}), ("NEW", "targets: fraction=0.5")),
        (lambda c: c.update(seeds=[0, 1]), ("NEW", "seeds: 1")),
        (lambda c: c["methods"].insert(0, {"name": "other"}), ("NEW", "methods: other")),
        (lambda c: c["models"].append({"id": "n", "path": "n"}), ("NEW", "models: n")),
        (lambda c: c["evaluation"]["tasks"].insert(0, "arc_easy"), ("NEW", "evaluation.tasks: arc_easy")),
        (lambda c: c["evaluation"].update(tasks=[]), ("LEFT_OUT", "evaluation.tasks: blimp")),
        (lambda c: c.update(exclude=[{"seed": 0}]), ("LEFT_OUT", "exclude: seed=0")),
        (
            lambda c: c["evaluation"].update(also_before_recovery=False),
            ("NEW", "evaluation.also_before_recovery: true → false"),
        ),
        (lambda c: c["evaluation"].update(limit=5), ("AGAIN", "evaluation.limit: (not given) → 5")),
        (
            lambda c: c["methods"][0]["recovery"].update(teacher_cache="topk"),
            ("AGAIN", 'methods.iterabre.recovery.teacher_cache: "auto" → "topk"'),
        ),
        (
            lambda c: c["methods"][0]["recovery"].update(teacher_cache="off"),
            ("HARMLESS", 'methods.iterabre.recovery.teacher_cache: "auto" → "off"'),
        ),
        (
            lambda c: c["evaluation"].update(batch_size=5),
            ("HARMLESS", 'evaluation.batch_size: "auto" → 5'),
        ),
        (
            lambda c: c["methods"][0]["recovery"].update(max_tokens=4096),
            ("AGAIN", "methods.iterabre.recovery.max_tokens: 2500000 → 4096"),
        ),
        (
            lambda c: c["methods"][0]["recovery"].update(micro_batch_size=1),
            ("HARMLESS", "methods.iterabre.recovery.micro_batch_size: 4 → 1"),
        ),
        (
            lambda c: c["models"][0].update(overrides={"recovery": {"adapter": {"rank": 4}}}),
            ("AGAIN", "models.m.overrides.recovery.adapter.rank: (not given) → 4"),
        ),
        (
            lambda c: c["models"][0].update(overrides={"recovery": {"micro_batch_size": 4}}),
            ("HARMLESS", "models.m.overrides.recovery.micro_batch_size: (not given) → 4"),
        ),
        (
            lambda c: c.update(execution={"scoring": {"actors": 9}}),
            ("HARMLESS", "execution.scoring.actors: 2 → 9"),
        ),
        (lambda c: c.update(name="d"), ("CONTRADICTION", 'name: "c" → "d"')),
    ],
)  # fmt: skip
def test_a_changed_field_means_what_its_results_depend_on(edit: Edit, wanted: tuple[str, str]) -> None:
    assert changes(record(edited(edit))) == [wanted]


def test_nothing_has_changed_where_only_the_order_has() -> None:
    several = edited(
        lambda c: c.update(
            methods=[*c["methods"], {"name": "x"}], seeds=[0, 1], targets=[{"layers": 3}, {"layers": 2}]
        )
    )
    turned = {**several, **{name: several[name][::-1] for name in ("methods", "seeds", "targets")}}
    assert changes(record(turned), record(several)) == []


def test_a_file_that_was_edited_in_place_is_found() -> None:
    data = ("methods", "iterabre", "recovery", "data")
    now = record(contents={**CONTENTS, data: "d" * 64})
    line = f"methods.iterabre.recovery.data (content): {'b' * 12} → {'d' * 12}"
    assert changes(now) == [("AGAIN", line)]


def test_another_model_under_the_same_id_contradicts() -> None:
    other = {**CONTENTS, ("models", "m"): "e" * 64}
    assert changes(record(contents=other)) == [
        ("CONTRADICTION", f"models.m (content): {'a' * 12} → {'e' * 12}")
    ]
    # Another change of the entry does not hide it.
    rank = edited(lambda c: c["models"][0].update(trust_remote_code=True))
    assert changes(record(rank, contents=other))[0] == (
        "CONTRADICTION",
        f"models.m (content): {'a' * 12} → {'e' * 12}",
    )
    moved = edited(lambda c: c["models"][0].update(path="/elsewhere/model"))
    line = 'models.m.path: "org/model" → "/elsewhere/model"'
    assert changes(record(moved, contents=other)) == [("CONTRADICTION", line)]
    assert changes(record(moved)) == [("HARMLESS", line)]
    assert changes(record(moved), record(contents={})) == [("CONTRADICTION", line)]


def test_a_text_that_was_moved_is_the_same_one() -> None:
    moved = edited(lambda c: c["methods"][0]["recovery"]["data"].update(path="there.txt"))
    line = 'methods.iterabre.recovery.data.path: "text.txt" → "there.txt"'
    assert changes(record(moved)) == [("HARMLESS", line)]
    data = ("methods", "iterabre", "recovery", "data")
    assert changes(record(moved, contents={**CONTENTS, data: "d" * 64})) == [("AGAIN", line)]


def test_of_a_deepspeed_file_only_the_optimizer_and_precision_matter() -> None:
    now = record(deepspeed={"optimizer": {"type": "Adam"}, "steps_per_print": 7})
    assert changes(now) == [
        ("AGAIN", 'execution.training.deepspeed.optimizer.type: "AdamW" → "Adam"'),
        ("HARMLESS", "execution.training.deepspeed.steps_per_print: 5 → 7"),
    ]
    assert changes(now, record(deepspeed=None)) == []


def test_what_matters_most_is_shown_first() -> None:
    def several(c: dict[str, Any]) -> None:
        c["name"] = "d"
        c["seeds"] = [1]
        c["methods"][0]["recovery"]["max_tokens"] = 5

    now = record(edited(several), versions={"torch": "2.1"})
    assert described(compare(record(), now)).splitlines() == [
        "  contradicts what the run is of:",
        '    name: "c" → "d"',
        "  computed again, where a stage depends on it:",
        "    methods.iterabre.recovery.max_tokens: 2500000 → 5",
        "  new:",
        "    seeds: 1",
        "  no longer asked for; results are kept:",
        "    seeds: 0",
        "  changes no result:",
        "    version of torch: 2.0 → 2.1",
    ]
    assert [effect.name for effect in Effect] == ["CONTRADICTION", "AGAIN", "NEW", "LEFT_OUT", "HARMLESS"]
