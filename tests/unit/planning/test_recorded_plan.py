"""A plan, written as JSON and read again, is the same plan."""

import json
from pathlib import Path
from typing import Any

from actors.contracts import ArtifactRef, FileRef
from orchestrator.config import parse_config
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.planner import build_plan
from tests.support.tiny_campaign import tiny_campaign

ADAPTER = ArtifactRef("/somewhere/payload-1", (FileRef("adapter_model.safetensors", 10, "ab" * 32),))


def _campaign(directory: Path) -> dict[str, Any]:
    """Return a campaign whose methods differ in all that a plan records otherwise."""
    campaign = tiny_campaign(directory)
    answers = directory / "answers.jsonl"
    answers.write_text("\n".join(json.dumps({"q": f"What is {i}?"}) for i in range(8)))
    template = directory / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    [kd] = campaign["methods"]
    prompts = {"path": str(answers), "prompt_column": "q", "chat_template": str(template)}
    none = {"objective": "none"}
    teacher = {"id": "teacher", "path": campaign["models"][0]["path"], "dtype": "bfloat16"}
    more = {
        "start": {"recovery": {**kd["recovery"], "start": "linear_bridge"}},
        "sgr": {
            "recovery": {
                **kd["recovery"],
                "objective": "sgr",
                "data": prompts,
                "generation": {"max_new_tokens": 8},
            }
        },
        "teacher": {
            "recovery": {**kd["recovery"], "teacher": teacher, "loss": {"hidden": 0, "attention": 0}}
        },
        "laco": {
            "scoring": {**kd["scoring"], "criterion": "laco", "merge": {"group": 2}},
            "schedule": {"mode": "direct"},
            "recovery": none,
        },
        "random": {"scoring": {**kd["scoring"], "criterion": "random"}, "recovery": none},
    }
    campaign["methods"] += [{**kd, **changed, "name": name} for name, changed in more.items()]
    campaign["evaluation"] |= {"probes": ["degeneration"], "num_fewshot": {"arc_easy": 2}}
    return campaign


def _keys(plan: TrajectoryPlan) -> dict[str, str]:
    model = plan.dense.without((1,)).adapted(ADAPTER)
    text = plan.recovery_text
    specs: dict[str, Any] = {
        "score": plan.score_spec(model, 2),
        "evaluate": plan.evaluation_spec(model),
        "prune": model,
    }
    if plan.traits.applies_recovery:
        specs["recover"] = plan.recovery_spec(model, text)
    if plan.method.recovery.start is not None:
        specs["start"] = plan.start_spec(model, text)
    if (generation := plan.generation_spec()) is not None:
        specs["generate"] = generation
    return {
        kind: stage_key("recover" if kind == "start" else kind, plan.key_inputs(spec))
        for kind, spec in specs.items()
    }


def test_a_recorded_plan_asks_for_the_same_stages(tmp_path: Path) -> None:
    plans = build_plan(parse_config(_campaign(tmp_path), "campaign.yaml")).trajectories
    assert len({plan.method.name for plan in plans}) == 6
    for plan in plans:
        written = plan.to_json()
        read = TrajectoryPlan.from_json(json.loads(json.dumps(written)))
        assert read == plan
        # Fields that are no more.
        written["method"]["scoring"]["granularity"] = "block"
        written["evaluation"]["model"]["zeroed"] = []
        assert TrajectoryPlan.from_json(json.loads(json.dumps(written))) == plan
        assert _keys(read) == _keys(plan)
        # These are no part of equality, and what they name is refused if it has changed since.
        assert read.model.spec.contents == plan.model.spec.contents is not None
        assert read.recovery_text.fingerprint == plan.recovery_text.fingerprint
        assert read.recovery_text.template == plan.recovery_text.template
        assert [text.fingerprint for text in read.texts.values()] == [
            text.fingerprint for text in plan.texts.values()
        ]
        assert {spec.contents for spec in read.fingerprints if hasattr(spec, "contents")} == {
            spec.contents for spec in plan.fingerprints if hasattr(spec, "contents")
        }
