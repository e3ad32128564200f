"""The recommendation at each size: its uncertainty, and when it is none."""

from dataclasses import replace

import pytest

from orchestrator.reporting.data.accuracies import with_mean_accuracy
from orchestrator.reporting.data.comparisons import Entry, entries
from orchestrator.reporting.data.due import Due
from orchestrator.reporting.data.measured import Measured, Number
from orchestrator.reporting.tables.metric_names import named
from orchestrator.reporting.tables.summary import Choice, best_at_each_size, of_method
from orchestrator.reporting.tables.tables import show

PERPLEXITY, ACCURACY = "wikitext2/token_perplexity", "arc_easy/acc"


def _measured(method: str, seed: int, **numbers: tuple[float, float | None]) -> Measured:
    names = {"perplexity": PERPLEXITY, "accuracy": ACCURACY}
    found = {names[name]: Number(value, error, "key") for name, (value, error) in numbers.items()}
    return Measured(f"{method}-{seed}", "smol", method, seed, 1, "recovered", 9, 1000, found)


def _choice(*models: Measured) -> Choice:
    (choice,) = best_at_each_size(entries(models))
    return choice


def test_several_seeds_give_the_mean_and_the_standard_error_over_them() -> None:
    # 30, 32 and 34: mean 32, deviation 2, over the root of 3: 1.155.
    choice = _choice(*(_measured("a", seed, perplexity=(30.0 + 2 * seed, None)) for seed in range(3)))
    assert (choice.metric, choice.value) == ("WikiText-2 perplexity", "32 ± 1.2")
    assert choice.why == "± is one standard error, 3 seeds"
    assert (choice.rivals, choice.even) == ((), ())


def test_the_error_of_the_questions_adds_to_that_of_the_seeds() -> None:
    # 0.60 and 0.68: deviation 0.0566, over the root of 2: 0.04; with 0.03 of the questions: 0.05.
    choice = _choice(_measured("a", 0, accuracy=(0.60, 0.03)), _measured("a", 1, accuracy=(0.68, 0.03)))
    assert choice.value == "0.64 ± 0.05"


def test_one_seed_has_the_error_of_the_questions_only() -> None:
    choice = _choice(_measured("a", 0, accuracy=(0.6, 0.03)))
    assert (choice.value, choice.why) == ("0.6 ± 0.03", "± is one standard error, one seed")


def test_a_perplexity_of_one_seed_is_said_to_have_none() -> None:
    only = _choice(_measured("a", 0, perplexity=(30.0, None)))
    assert (only.value, only.why) == ("30", "one seed, without an error")


def test_the_mean_accuracy_decides_where_there_are_tasks() -> None:
    models = [
        _measured(method, 0, perplexity=(perplexity, None), accuracy=(accuracy, 0.01))
        for method, perplexity, accuracy in (("a", 30.0, 0.4), ("b", 31.0, 0.6))
    ]
    second = {"boolq/acc": Number(0.5, 0.01, "key")}
    models = [replace(model, numbers={**model.numbers, **second}) for model in models]
    choice = _choice(*with_mean_accuracy(models))
    assert (choice.method, choice.metric, choice.rivals) == ("b", "mean accuracy", ("a (0.45 ± 0.0071)",))


def test_a_difference_of_noise_is_no_recommendation() -> None:
    choice = _choice(
        _measured("a", 0, perplexity=(48_430.0, None)), _measured("b", 0, perplexity=(48_436.0, None))
    )
    assert choice.even == ("b",)
    assert choice.why == "one seed, and less than 2 % between them in WikiText-2 perplexity"


def test_of_accuracies_that_are_level_the_lowest_perplexity_is_chosen() -> None:
    models = [
        _measured(method, 0, perplexity=(perplexity, None), accuracy=(accuracy, 0.02))
        for method, perplexity, accuracy in (("a", 90.0, 0.41), ("b", 38.0, 0.40), ("c", 30.0, 0.2))
    ]
    second = {"boolq/acc": Number(0.5, 0.01, "key")}
    models = [replace(model, numbers={**model.numbers, **second}) for model in models]
    choice = _choice(*with_mean_accuracy(models))
    assert (choice.method, choice.even) == ("b", ("a",))
    assert choice.why.endswith("; of these it has the lowest WikiText-2 perplexity")
    assert [rival.split()[0] for rival in choice.rivals] == ["a", "c"]


def test_the_size_is_a_target_and_names_where_the_model_lies() -> None:
    models = [_measured("a", 0, perplexity=(30.0, None))]
    models.append(replace(models[0], layers=8))
    (choice,) = best_at_each_size(entries(models), exports={("a-0", 8): "runs/x/models/a-0/8-layers"})
    assert (choice.size, choice.path) == ("8 layers", "runs/x/models/a-0/8-layers")


@pytest.mark.parametrize("metric", ["degeneration/repetition", "arithmetic/accuracy"])
def test_a_number_that_is_0_on_the_unpruned_model_has_no_factor(metric: str) -> None:
    dense, recovered = (
        Measured("a-0", "smol", "a", 0, iteration, phase, layers, 1000, {metric: Number(value, None, "key")})
        for iteration, phase, layers, value in ((0, "dense", 10, 0.0), (1, "recovered", 9, 0.25))
    )
    assert _choice(dense, recovered).facts[-1] == ("0.25", f"{named(metric)}, unpruned 0")


@pytest.mark.parametrize(
    ("theirs", "apart"),
    [
        (0.65, False),  # 0.05 apart, the error of the difference is hypot(0.03, 0.04) = 0.05: one of it
        (0.61, False),  # 0.09: 1.8 of it
        (0.59, True),  # 0.11: 2.2 of it
    ],
)
def test_methods_within_the_errors_of_both_are_not_reported_apart(theirs: float, apart: bool) -> None:
    choice = _choice(
        _measured("best", 0, accuracy=(0.70, 0.03)),
        _measured("other", 0, accuracy=(theirs, 0.04)),
        _measured("far", 0, accuracy=(0.2, 0.04)),
    )
    assert choice.method == "best"
    assert choice.rivals == (f"other ({theirs} ± 0.04)", "far (0.2 ± 0.04)")
    assert choice.even == (() if apart else ("other",))


def test_equal_numbers_are_not_reported_apart_even_where_the_seeds_agree() -> None:
    same = [_measured(method, seed, perplexity=(30.0, None)) for method in "ab" for seed in range(2)]
    assert _choice(*same).even == ("b",)


def test_a_method_that_is_due_keeps_the_other_from_being_chosen() -> None:
    found = entries([_measured("a", 0, perplexity=(30.0, None))])
    later = Due("smol", "b", 9, reached=False, ended=False)
    (choice,) = best_at_each_size(found, [later])
    assert (choice.method, choice.due, choice.rivals) == ("", ("b is not measured yet",), ("a (30)",))
    (choice,) = best_at_each_size(found, [replace(later, ended=True)])
    assert (choice.method, choice.due, choice.ended) == ("a", (), ("b",))
    # At other depths, and of other sources, nothing is kept waiting.
    for elsewhere in (replace(later, layers=8), replace(later, model="other")):
        assert _choices(found, elsewhere)[9].method == "a"


def test_a_method_of_which_a_seed_is_due_is_not_complete() -> None:
    found = entries([_measured(method, 0, perplexity=(30.0, None)) for method in "ab"])
    choice = _choices(found, Due("smol", "b", 9, reached=True, ended=False))[9]
    assert choice.due == ("b is not measured yet with all seeds",)


def test_a_method_without_the_deciding_metric_is_not_passed_over() -> None:
    found = entries([_measured("a", 0, perplexity=(30.0, None)), _measured("b", 0, accuracy=(0.5, 0.1))])
    assert _choices(found)[9].due == ("b is not measured yet by WikiText-2 perplexity",)


def test_depths_that_are_pruned_and_not_measured_are_reported() -> None:
    dense = Measured("a-0", "smol", "a", 0, 0, "dense", 10, 1100, {PERPLEXITY: Number(20.0, None, "key")})
    due = Due("smol", "a", 9, reached=True, ended=False)
    (choice,) = best_at_each_size(entries([dense]), [due, replace(due, layers=8, reached=False)])
    assert (choice.size, choice.due) == ("9 of 10 layers", ("a is not measured yet",))


def _choices(found: list[Entry], *due: Due) -> dict[int, Choice]:
    return {int(choice.size.split()[0]): choice for choice in best_at_each_size(found, due)}


def test_a_method_s_sentence_has_the_same_error() -> None:
    dense = Measured("a-0", "smol", "a", 0, 0, "dense", 10, 1100, {PERPLEXITY: Number(20.0, None, "key")})
    pruned = [_measured("a", seed, perplexity=(30.0 + 2 * seed, None)) for seed in range(3)]
    found: list[Entry] = entries([dense, *pruned])
    assert of_method(found).endswith("WikiText-2 perplexity 20 → 32 ± 1.2.")


def test_large_errors_have_no_exponent() -> None:
    assert show(Number(12_345.0, 250.4, "key")) == "12,345 ± 250"
