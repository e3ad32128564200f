"""Suites against lm-eval's list of tasks; what is summed up against the samples themselves."""

import random
import statistics
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.tasks._yaml_loader import load_yaml

from actors.contracts import Metric
from actors.errors import RequestError
from actors.evaluation import SUITES, suite_tasks
from actors.evaluation.lm_eval.suites import BLIMP_GROUPS, blimp_groups, suite_means
from actors.evaluation.lm_eval.task_loading import TASKS, _task_index


def test_every_member_is_a_task_of_lm_eval_or_ours() -> None:
    known = _task_index(None, include_defaults=True).task_index
    assert {member for suite in SUITES.values() for member in suite.members} <= known.keys()
    assert [name for name, suite in SUITES.items() if suite.executes_code] == [
        "generative",
        "generative_instruct",
    ]
    assert not any(known[member].cfg.get("unsafe_code") for s in SUITES.values() for member in s.members)


def test_suites_give_their_members_once_with_the_suffix() -> None:
    assert suite_tasks(["knowledge"], "_local") == ("boolq_local", "mmlu_local")
    both = suite_tasks(["reasoning", "classification"])
    assert len(both) == len(set(both)) == 8
    with pytest.raises(RequestError, match=r"unknown suite 'reason'; did you mean.*reasoning"):
        suite_tasks(["reason"])


def test_the_mean_of_a_suite_waits_for_all_members() -> None:
    metrics = [Metric("boolq_x/acc", 0.5, stderr=0.03), Metric("mmlu_x/acc", 0.3, stderr=0.04)]
    (mean,) = suite_means(metrics, ["knowledge", "reasoning"], "_x")
    assert (mean.name, mean.value) == ("knowledge/mean", 0.4)
    assert mean.stderr == pytest.approx(0.025)
    assert list(suite_means(metrics, ["knowledge"])) == []
    (bare,) = suite_means([*metrics[:1], Metric("mmlu_x/acc", 0.3)], ["knowledge"], "_x")
    assert bare.stderr is None


def test_the_groups_of_blimp_hold_each_paradigm_that_the_paper_lists_once() -> None:
    """Appendix C leaves out two of the 67."""
    official = Path(lm_eval.__file__).parent / "tasks" / "blimp" / "_blimp.yaml"
    paradigms = [f"blimp_{paradigm}" for group in BLIMP_GROUPS.values() for paradigm in group]
    assert len(BLIMP_GROUPS) == 13
    left_out = ["blimp_tough_vs_raising_1", "blimp_tough_vs_raising_2"]
    assert sorted([*paradigms, *left_out]) == sorted(yaml.safe_load(official.read_text())["task"])


def test_groups_of_blimp_pool_the_samples_of_their_paradigms() -> None:
    """The mean is that of all samples; the error that of their pooled variance within paradigms."""
    rng = random.Random(0)
    samples = {
        f"blimp_{p}_local": [rng.random() < 0.7 for _ in range(rng.randint(20, 40))]
        for group in ("blimp_ellipsis_argument", "blimp_coordinate_structures")
        for p in BLIMP_GROUPS[group]
    }
    metrics = [
        Metric(f"{task}/acc", statistics.mean(hits), stderr=statistics.stdev(hits) / len(hits) ** 0.5)
        for task, hits in samples.items()
    ]
    found = {m.name: m for m in blimp_groups(metrics, {task: len(hits) for task, hits in samples.items()})}
    assert set(found) == {"blimp_ellipsis_argument_local/acc", "blimp_coordinate_structures_local/acc"}
    members = [samples[f"blimp_{p}_local"] for p in BLIMP_GROUPS["blimp_ellipsis_argument"]]
    pooled = [hit for hits in members for hit in hits]
    within = sum(statistics.variance(hits) * (len(hits) - 1) for hits in members)
    ellipsis = found["blimp_ellipsis_argument_local/acc"]
    assert ellipsis.value == pytest.approx(statistics.mean(pooled))
    assert ellipsis.stderr == pytest.approx((within / (len(pooled) - 3) / len(pooled)) ** 0.5)


def test_summaries_are_compared_by_rouge() -> None:
    rouge = load_yaml(TASKS / "xsum.yaml")["process_results"]
    scores = rouge({"summary": "the lazy dog sleeps"}, [" the dog sleeps soundly\n"])
    assert scores == {
        "rouge1": pytest.approx(0.75),
        "rouge2": pytest.approx(1 / 3),
        "rougeL": pytest.approx(0.75),
    }
