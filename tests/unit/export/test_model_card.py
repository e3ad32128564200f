"""The card of an exported model: what a stranger needs in order to believe it and to use it."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from huggingface_hub import ModelCard

from actors.contracts import ArtifactRef, ExportResult
from actors.evaluation.lm_eval.task_loading import _task_index
from orchestrator.config import parse_config
from orchestrator.export.hub_datasets import TASKS, HubDataset, task_dataset
from orchestrator.export.model_card import model_card
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.planner import build_plan
from tests.support.tiny_campaign import tiny_campaign

WHEN = datetime(2026, 11, 29, tzinfo=UTC)
VERSIONS = {"iterabre": "0.1.0", "lm-eval": "0.4.13", "torch": "2.13.0", "deepspeed": "0.19"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryPlan:
    campaign = tiny_campaign(tmp_path_factory.mktemp("campaign"))
    campaign["methods"][0]["recovery"] |= {
        "data": {"builtin": "wikitext-2-raw-validation"},
        "start": "linear_bridge",
        "loss": {"hidden": 0.0, "attention": 0.0, "logit_loss": "forward_kl", "next_token": 0.5},
    }
    campaign["evaluation"] = {
        "perplexity": [
            *campaign["evaluation"]["perplexity"],
            {"name": "wikitext2", "data": {"builtin": "wikitext-2-raw-test"}, "context": 64},
        ],
        "tasks": ["blimp_sample", "wikitext2_prefix"],
        "limit": 20,
        "num_fewshot": {"blimp_sample": 2},
    }
    return build_plan(parse_config(campaign, "campaign.yaml")).trajectories[0]


def _row(plan: TrajectoryPlan, stage: str, metric: str, value: float, **more: Any) -> dict[str, Any]:
    common = {
        "trajectory": plan.id,
        "iteration": 1,
        "stage": stage,
        "phase": None,
        "stderr": None,
        "step": None,
    }
    return {**common, "layer": None, "when": WHEN, "metric": metric, "value": value, **more}


def _rows(plan: TrajectoryPlan) -> list[dict[str, Any]]:
    dense = {"iteration": 0, "phase": "dense"}
    return [
        _row(plan, "evaluate", "wikitext2/token_perplexity", 20.0, **dense),
        _row(plan, "evaluate", "wikitext2/token_perplexity", 25.5, phase="recovered"),
        _row(plan, "evaluate", "wikitext2/token_perplexity", 99.0, phase="pruned"),
        _row(plan, "evaluate", "fox/token_perplexity", 7.0, phase="recovered"),
        _row(plan, "evaluate", "blimp_sample/acc", 0.8, stderr=0.0283, **dense),
        _row(plan, "evaluate", "blimp_sample/acc", 0.75, stderr=0.0306, phase="recovered"),
        _row(plan, "prune", "dropped", 0.987, layer=2),
        _row(plan, "prune", "dropped", 0.9, layer=1, iteration=2),
        _row(plan, "recover", "tokens", 96.0),
        *(_row(plan, "recover", "loss", 1.0, step=step) for step in range(3)),
    ]


def _card(plan: TrajectoryPlan, address: str = "runs/tiny/models/llama/3-layers") -> str:
    result = ExportResult(ArtifactRef("x", ()), 3, 40_000)
    model = plan.dense.without((2,))
    return model_card(plan, plan.iterations[0], model, _rows(plan), result, address, VERSIONS)


def test_the_card_says_how_the_model_was_made_and_measured(plan: TrajectoryPlan) -> None:
    card = _card(plan)
    lines, parameters = card.splitlines(), plan.model.num_parameters
    for line in (
        "| transformer blocks | 4 | 3 |",
        f"| parameters | {parameters:,} | 40,000 ({40_000 / parameters - 1:+.1%}) |",
        "| 1 | 2 | 0.987 |",
        "| objective | `kd` after `linear_bridge` |",
        "| text | `wikitext-2-raw-validation` |",
        "| tokens | 96 |",
        "| loss | 1 × logits (forward_kl) + 0.5 × next token |",
        "| trained | lora, rank 4, alpha 4, all-linear |",
        "| optimizer steps | 3 of 2 sequences |",
        "| learning rate | 0.001, linear, 0 steps of warm-up |",
        "| wikitext2/token_perplexity | 20 | 25.5 |",
        "| blimp_sample/acc | 0.8 ± 0.028 | 0.75 ± 0.031 |",
        "| fox/token_perplexity | – | 7 |",
        "- Tasks by lm-evaluation-harness; n-shot: 2 for blimp_sample, else the task's own number; "
        "documents: the first 20 of each task.",
        "- `fox`: `text.txt`, its first 256 tokens in windows of 32 that do not overlap.",
        "- `wikitext2`: `wikitext-2-raw-test`, the whole text in windows of 64 that do not overlap.",
        "- Weights in float32. Measured 2026-11-29.",
        "- ± is the standard error over a task's documents.",
        "Removed: block 2 of the source, counted from 0, by the criterion `hidden_cosine`.",
        "- Versions: iterabre 0.1.0, lm-eval 0.4.13, torch 2.13.0.",
        'model = AutoModelForCausalLM.from_pretrained("3-layers")',
    ):
        assert line in lines, card
    assert "which flatters it" in card
    assert "arXiv preprint arXiv:2503.06291" in card
    assert "99" not in re.sub(r"[\d,]*\d{3}", "", card), "measured before recovery"
    assert not re.search(r"\n\n\n", card)


def test_the_hub_reads_evaluations_on_its_own_data_sets_alone(plan: TrajectoryPlan) -> None:
    data = ModelCard(_card(plan)).data
    found = {
        (each.dataset_type, each.dataset_config, each.dataset_split, each.metric_type, each.metric_value)
        for each in data.eval_results
    }
    assert found == {
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "perplexity", 25.5),
        ("nyu-mll/blimp", None, None, "accuracy", 0.75),
    }
    assert data.datasets == ["Salesforce/wikitext"]


def test_a_place_of_this_machine_is_not_told(plan: TrajectoryPlan) -> None:
    for place in ("/home/somebody/3-layers", "s3://bucket/runs/3-layers"):
        card = _card(plan, place)
        assert 'from_pretrained("3-layers")' in card
        assert place not in card
    assert 'from_pretrained("den/new")' in _card(plan, "den/new")


def test_data_sets_of_tasks_are_those_of_their_files() -> None:
    index = _task_index(None, True).task_index
    for name, dataset in TASKS.items():
        fields = index[name].cfg
        held = [fields[split] for split in ("test_split", "validation_split") if fields.get(split)]
        # Files that take theirs from another file say only what differs.
        if "dataset_path" in fields:
            config = fields.get("dataset_name")
            assert dataset == HubDataset(fields["dataset_path"], config, held[0]), name
    assert task_dataset("mmlu_stem") == HubDataset("cais/mmlu")
    assert task_dataset("reasoning") is None
