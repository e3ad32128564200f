"""What is measured again when a campaign asks for more: nothing that is stored."""

from dataclasses import replace
from typing import Any

import pytest

from actors.contracts import EvaluationSpec, ModelRef, ModelSpec, PerplexitySpec, TextSpec, ThroughputSpec
from orchestrator.planning.evaluation_parts import evaluation_parts

TEXT = PerplexitySpec("fox", TextSpec(path="fox.txt", fingerprint="a"))
MORE = PerplexitySpec("more", TextSpec(path="more.txt", fingerprint="b"))
FIRST = EvaluationSpec(model=ModelRef(ModelSpec("m")), perplexity=(TEXT,), tasks=("a", "b"))
NOTHING: dict[str, Any] = {"perplexity": (), "tasks": (), "suites": (), "probes": (), "throughput": None}


def parts(
    spec: EvaluationSpec, former: list[EvaluationSpec], stored: list[EvaluationSpec]
) -> list[EvaluationSpec]:
    return evaluation_parts(spec, former, lambda each: each in stored)


@pytest.mark.parametrize(
    ("more", "rest"),
    [
        ({"tasks": ("c", "a", "b")}, {"tasks": ("c",)}),
        ({"perplexity": (TEXT, MORE)}, {"perplexity": (MORE,)}),
        ({"probes": ("arithmetic",)}, {"probes": ("arithmetic",)}),
        ({"throughput": ThroughputSpec()}, {"throughput": ThroughputSpec()}),
        ({"limit": 5}, {"tasks": ("a", "b"), "limit": 5}),
        ({"seed": 1, "tasks": ("a",)}, {"tasks": ("a",), "seed": 1}),
        ({"perplexity": (replace(TEXT, context=8),)}, {"perplexity": (replace(TEXT, context=8),)}),
        (
            {"tasks": ("a", "b", "c"), "num_fewshot": (("c", 5),)},
            {"tasks": ("c",), "num_fewshot": (("c", 5),)},
        ),
        ({"num_fewshot": (("a", 5),)}, {"tasks": ("a", "b"), "num_fewshot": (("a", 5),)}),
        ({"system_instruction": "x"}, {"tasks": ("a", "b"), "system_instruction": "x"}),
        ({"num_fewshot": 5}, {"tasks": ("a", "b"), "num_fewshot": 5}),
    ],
)
def test_what_is_stored_is_taken_over(more: dict[str, Any], rest: dict[str, Any]) -> None:
    wanted = [FIRST, replace(FIRST, **{**NOTHING, **rest})]
    assert parts(replace(FIRST, **more), [FIRST], [FIRST]) == wanted


def test_a_model_that_was_not_measured_is_measured_at_once() -> None:
    now = replace(FIRST, tasks=("a", "b", "c"))
    assert parts(now, [FIRST], []) == [now]
    assert parts(now, [FIRST], [FIRST, now]) == [now]
    assert parts(now, [], [FIRST]) == [now]


def test_what_is_asked_for_no_more_leaves_nothing_to_do() -> None:
    assert parts(replace(FIRST, tasks=("b",)), [FIRST], [FIRST]) == [FIRST]


def test_a_text_that_was_edited_is_measured_again() -> None:
    edited = PerplexitySpec("fox", TextSpec(path="fox.txt", fingerprint="z"))
    (first, rest) = evaluation_parts(
        replace(FIRST, perplexity=(edited,)), [FIRST], lambda each: _fingerprints(each) == ["a"]
    )
    assert (_fingerprints(first), _fingerprints(rest), rest.tasks) == (["a"], ["z"], ())


def _fingerprints(spec: EvaluationSpec) -> list[str | None]:
    return [text.data.fingerprint for text in spec.perplexity]


def test_a_suite_is_measured_as_a_whole() -> None:
    members = ("hellaswag", "piqa")
    first = replace(FIRST, tasks=members)
    whole = ("arc_challenge", "arc_easy", "hellaswag", "copa", "piqa")
    now = replace(first, suites=("reasoning",), tasks=whole)
    assert parts(now, [first], [first]) == [first, replace(now, perplexity=())]
    later = replace(now, tasks=(*whole, "boolq"))
    rest = replace(later, perplexity=(), suites=(), tasks=("boolq",))
    assert parts(later, [first, now], [first, replace(now, perplexity=())])[-1] == rest


def test_growth_upon_growth_measures_only_the_newest() -> None:
    second, third = replace(FIRST, tasks=("a", "b", "c")), replace(FIRST, tasks=("a", "b", "c", "d"))
    added = replace(FIRST, perplexity=(), tasks=("c",))
    left = replace(FIRST, perplexity=(), tasks=("d",))
    assert parts(third, [FIRST, second], [FIRST, added]) == [added, FIRST, left]
    # Of a model that came with the second form, all but the newest task is in one stage.
    assert parts(third, [FIRST, second], [second]) == [second, left]


def test_many_former_evaluations_take_few_looks() -> None:
    looks: list[EvaluationSpec] = []

    def is_stored(each: EvaluationSpec) -> bool:
        looks.append(each)
        return False

    former = [replace(FIRST, tasks=tuple(f"t{i}" for i in range(n))) for n in range(20)]
    evaluation_parts(FIRST, former, is_stored)
    assert len(looks) <= 2 * (len(former) + 1)
