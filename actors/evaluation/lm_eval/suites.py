"""The papers' batteries of tasks by name, and what is summed up over several tasks.

A new suite is one row of `SUITES`. Every metric that lm-eval computes for a
member is kept; the suite says which one its mean is taken of.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.contracts import Metric
from actors.errors import unknown_name

ITERABRE = "IteRABRe §4"
LIMITS = "On the Limits of Layer Pruning §2"


@dataclass(frozen=True)
class Suite:
    """Tasks that a paper reports together: each member's lm-eval task or group, with the metric it counts by.

    `executes_code` if a member runs programs that the model wrote.
    """

    members: Mapping[str, str]
    paper: str
    executes_code: bool = False


SUITES: dict[str, Suite] = {
    # IteRABRe writes "accuracy"; Table 1 gives the unpruned Llama-3.1-8B 60.03 on HellaSwag and 51.28 on
    # ARC-C, which are its acc (acc_norm is some 79 and 53).
    "reasoning": Suite(
        {"arc_challenge": "acc", "arc_easy": "acc", "hellaswag": "acc", "copa": "acc", "piqa": "acc"},
        ITERABRE,
    ),
    "language": Suite({"blimp": "acc", "race": "acc", "winogrande": "acc"}, ITERABRE),
    "knowledge": Suite({"boolq": "acc", "mmlu": "acc"}, ITERABRE),
    "multilingual": Suite({"xwinograd": "acc", "xstorycloze": "acc", "xnli": "acc"}, ITERABRE),
    # Limits gives retention alone and does not name the metric. acc_norm, where a task has it, is what the
    # leaderboards and the pruning papers it compares with use for choices of different lengths.
    "classification": Suite(
        {
            "hellaswag": "acc_norm",
            "piqa": "acc_norm",
            "mmlu": "acc",
            "winogrande": "acc",
            "openbookqa": "acc_norm",
            "arc_easy": "acc_norm",
            "arc_challenge": "acc_norm",
        },
        LIMITS,
    ),
    "generative": Suite(
        {
            "gsm8k": "exact_match,strict-match",
            "humaneval_plus": "pass_at_1",
            "mbpp_plus": "pass_at_1",
            "xsum": "rougeL",
        },
        LIMITS,
        executes_code=True,
    ),
    # The same for models that chat: where a conversation has them write a block of code, the plain code
    # tasks would end the answer at its first "def".
    "generative_instruct": Suite(
        {
            "gsm8k": "exact_match,strict-match",
            "humaneval_plus_instruct": "pass_at_1",
            "mbpp_plus_instruct": "pass_at_1",
            "xsum": "rougeL",
        },
        LIMITS,
        executes_code=True,
    ),
}
"""Suites by name."""

BLIMP_GROUPS: dict[str, tuple[str, ...]] = {
    "blimp_agreement": (
        "regular_plural_subject_verb_agreement_1",
        "regular_plural_subject_verb_agreement_2",
        "irregular_plural_subject_verb_agreement_1",
        "irregular_plural_subject_verb_agreement_2",
        "determiner_noun_agreement_1",
        "determiner_noun_agreement_2",
        "determiner_noun_agreement_irregular_1",
        "determiner_noun_agreement_irregular_2",
        "determiner_noun_agreement_with_adj_2",
        "determiner_noun_agreement_with_adj_irregular_1",
        "determiner_noun_agreement_with_adj_irregular_2",
        "determiner_noun_agreement_with_adjective_1",
        "anaphor_gender_agreement",
        "anaphor_number_agreement",
    ),
    "blimp_distractor_agreement": (
        "distractor_agreement_relational_noun",
        "distractor_agreement_relative_clause",
    ),
    "blimp_island_constraints": (
        "wh_island",
        "complex_NP_island",
        "adjunct_island",
        "sentential_subject_island",
        "left_branch_island_echo_question",
        "left_branch_island_simple_question",
    ),
    "blimp_movement_extraction": (
        "wh_questions_object_gap",
        "wh_questions_subject_gap",
        "wh_questions_subject_gap_long_distance",
        "coordinate_structure_constraint_object_extraction",
        "existential_there_subject_raising",
        "existential_there_object_raising",
        "expletive_it_object_raising",
    ),
    "blimp_wh_that": (
        "wh_vs_that_no_gap",
        "wh_vs_that_no_gap_long_distance",
        "wh_vs_that_with_gap",
        "wh_vs_that_with_gap_long_distance",
    ),
    "blimp_passive_causative": ("passive_1", "passive_2", "animate_subject_passive", "causative"),
    "blimp_transitivity": ("transitive", "intransitive", "inchoative", "animate_subject_trans"),
    "blimp_irregular_forms": ("irregular_past_participle_adjectives", "irregular_past_participle_verbs"),
    "blimp_negation_npi": (
        "npi_present_1",
        "npi_present_2",
        "only_npi_licensor_present",
        "only_npi_scope",
        "sentential_negation_npi_licensor_present",
        "sentential_negation_npi_scope",
        "matrix_question_npi_licensor_present",
    ),
    "blimp_quantifiers": (
        "superlative_quantifiers_1",
        "superlative_quantifiers_2",
        "existential_there_quantifiers_1",
        "existential_there_quantifiers_2",
    ),
    "blimp_binding_theory": (
        "principle_A_c_command",
        "principle_A_case_1",
        "principle_A_case_2",
        "principle_A_domain_1",
        "principle_A_domain_2",
        "principle_A_domain_3",
        "principle_A_reconstruction",
    ),
    "blimp_ellipsis_argument": ("ellipsis_n_bar_1", "ellipsis_n_bar_2", "drop_argument"),
    "blimp_coordinate_structures": ("coordinate_structure_constraint_complex_left_branch",),
}
"""BLiMP's paradigms, without their `blimp_`, in the 13 groups of IteRABRe, Appendix C.

The appendix puts 65 of the 67 into groups: `tough_vs_raising_1` and `_2` are in none.
"""


def suite_tasks(suites: Sequence[str], suffix: str = "") -> tuple[str, ...]:
    """Return the members of all suites, each once, in order; `suffix` is added to every name.

    Raises RequestError for a suite that does not exist.
    """
    for suite in suites:
        if suite not in SUITES:
            raise unknown_name("suite", suite, SUITES)
    return tuple(dict.fromkeys(member + suffix for suite in suites for member in SUITES[suite].members))


def suite_means(metrics: Sequence[Metric], suites: Sequence[str], suffix: str = "") -> Iterator[Metric]:
    """Return `SUITE/mean` of every suite whose members have all been measured.

    The plain mean over members, whatever their sizes, as in the papers' tables;
    its standard error is that of a mean of independent values.
    """
    measured = {metric.name: metric for metric in metrics}
    for suite in suites:
        names = [f"{member}{suffix}/{measure}" for member, measure in SUITES[suite].members.items()]
        if all(name in measured for name in names):
            members = [measured[name] for name in names]
            mean = sum(member.value for member in members) / len(members)
            errors = [member.stderr for member in members if member.stderr is not None]
            whole = len(errors) == len(members)
            stderr = math.sqrt(sum(error**2 for error in errors)) / len(members) if whole else None
            yield Metric(f"{suite}/mean", mean, stderr=stderr)


def blimp_groups(metrics: Sequence[Metric], sizes: Mapping[str, int]) -> Iterator[Metric]:
    """Return the accuracy of each of BLiMP's groups whose paradigms have all been measured.

    Every pair counts alike, and the standard error is pooled over paradigms, as
    lm-eval does for a group with `weight_by_size`. Variants of the tasks with a
    common suffix (`blimp_wh_island_local`) give groups with that suffix.

    Args:
        sizes: documents of each task.
    """
    measured = {metric.name: metric for metric in metrics}
    marker = "blimp_" + BLIMP_GROUPS["blimp_coordinate_structures"][0]
    suffixes = [task.removeprefix(marker) for task in sizes if task.startswith(marker)]
    for suffix in suffixes:
        for group, paradigms in BLIMP_GROUPS.items():
            tasks = [f"blimp_{paradigm}{suffix}" for paradigm in paradigms]
            if all(f"{task}/acc" in measured for task in tasks):
                members = [measured[f"{task}/acc"] for task in tasks]
                yield _pooled(f"{group}{suffix}/acc", members, [sizes[task] for task in tasks])


def _pooled(name: str, members: Sequence[Metric], sizes: Sequence[int]) -> Metric:
    """Return the mean of all documents, with the error of `lm_eval.api.metrics.pooled_sample_stderr`."""
    total = sum(sizes)
    value = sum(member.value * size for member, size in zip(members, sizes, strict=True)) / total
    errors = [(member.stderr, size) for member, size in zip(members, sizes, strict=True)]
    if total == len(sizes) or any(error is None for error, _ in errors):
        return Metric(name, value)
    variance = sum((size - 1) * size * error**2 for error, size in errors if error is not None)
    return Metric(name, value, stderr=math.sqrt(variance / (total - len(sizes)) / total))
