"""The cost model: operations against torch's own count, the arithmetic of prices by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from actors.contracts import GenerationSpec, ModelInfo, ModelSpec, TextSpec
from actors.models import describe_model
from orchestrator.config import CostConfig, parse_config
from orchestrator.errors import RequestError
from orchestrator.execution.dry_run import campaign_stages
from orchestrator.planning.cost_model import (
    MACHINES,
    StageCost,
    activation_bytes,
    block_flops,
    calibration,
    head_flops,
    kept_parameters,
    low_rank_parameters,
    machine_of,
    parse_machine,
    seconds,
    task_tokens,
    training_block_flops,
)
from orchestrator.planning.estimate import (
    costed_stages,
    estimate,
    plan_summary,
    stage_cost,
)
from orchestrator.planning.plan import TextSize
from orchestrator.planning.planner import build_plan
from orchestrator.planning.stages import PlannedStage
from orchestrator.scheduling.limits import Limits, spent_before
from orchestrator.scheduling.resources import CLOSED_FORM, TASK_SCORING
from orchestrator.storage.ledger import Ledger, Row, measured_seconds
from tests.support.tiny_campaign import tiny_campaign
from tests.support.tiny_models import save_tiny, tiny_ids, tiny_llama, tiny_model, tiny_tokenizer

B, T = 2, 24
RANK = 4


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return describe_model(ModelSpec(save_tiny(tmp_path_factory.mktemp("cost") / "model", num_layers=4)))


def _counted(run: Callable[[Any], None], num_layers: int, lora: bool = False) -> int:
    """Operations of `run(model)` as torch counts them."""
    model, _ = tiny_llama(num_layers, attn_implementation="eager")
    if lora:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    with FlopCounterMode(display=False) as counter:
        run(model)
    return counter.get_total_flops()


def _forward(model: Any) -> None:
    with torch.no_grad():
        model(tiny_ids(B, T), use_cache=False)


def _step(model: Any) -> None:
    model(tiny_ids(B, T), use_cache=False).logits.sum().backward()


def test_a_forward_pass_is_counted_as_torch_does(info: ModelInfo) -> None:
    blocks = 4 * block_flops(info, B * T, T)
    # Norms are among the parameters and not among the products; the rotary table is the other way round.
    assert _counted(_forward, 4) == pytest.approx(blocks + head_flops(info, B * T), rel=0.01)
    one_block = (_counted(_forward, 6) - _counted(_forward, 4)) / 2
    assert one_block == pytest.approx(block_flops(info, B * T, T), rel=0.01)


def test_a_step_with_low_rank_updates_is_counted_as_torch_does(info: ModelInfo) -> None:
    # Between two depths, so that the first block, whose input needs no gradient, does not count.
    one_block = (_counted(_step, 6, lora=True) - _counted(_step, 4, lora=True)) / 2
    assert one_block == pytest.approx(training_block_flops(info, B * T, T, RANK), rel=0.01)


def test_a_step_of_all_weights_is_counted_as_torch_does(info: ModelInfo) -> None:
    one_block = (_counted(_step, 6) - _counted(_step, 4)) / 2
    assert one_block == pytest.approx(training_block_flops(info, B * T, T, None), rel=0.01)


def test_parameters_are_those_of_the_model(info: ModelInfo) -> None:
    model, _ = tiny_llama(4)
    shallow, _ = tiny_llama(3)
    assert kept_parameters(info, 4) == model.num_parameters()
    assert kept_parameters(info, 3) == shallow.num_parameters()
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    assert 4 * low_rank_parameters(info, RANK) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("family", "width"), [("gpt2", 32), ("gemma2", 32), ("gemma4_text", 32)])
def test_widths_are_found_in_every_family(family: str, width: int, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    info = describe_model(ModelSpec(str(tmp_path)))
    assert (info.hidden_size, info.attention_width, len(info.block_parameters)) == (32, width, 6)


def test_activations_by_hand() -> None:
    info = ModelInfo(ModelSpec("m"), "llama", 1, 1, 1, "f", (1,), hidden_size=8, num_heads=2)
    # 34 · 8 a token and 5 · 2 · 16 of attention, for 32 tokens in sequences of 16, in 16 and 32 bits.
    assert activation_bytes(info, 32, 16, 2) == 32 * (272 + 160)
    assert activation_bytes(info, 32, 16, 4) == 2 * 32 * (272 + 160)


def test_time_by_hand() -> None:
    machine = replace(MACHINES["A100-80G"], bf16_tflops=100.0, fp32_tflops=10.0)
    cost = StageCost(flops=1e15, load_bytes=2e9)
    # 15 s to start, 2 s to load, 10¹⁵ over 2 x 10¹⁴ x 0.5.
    assert seconds(cost, "score", machine, 2, "bfloat16", 0.5) == 15 + 2 + 10
    assert seconds(cost, "score", machine, 2, "float32", 0.5) == 15 + 2 + 100


def test_calibration_is_measured_over_predicted_by_kind() -> None:
    measured = {("score", "a"): 10.0, ("score", "b"): 20.0, ("recover", "c"): 7.0, ("recover", "x"): 99.0}
    predicted = {("score", "a"): 5.0, ("score", "b"): 5.0, ("recover", "c"): 14.0, ("evaluate", "d"): 1.0}
    assert calibration(measured, predicted) == {"recover": 0.5, "score": 3.0}


def test_machines_are_named_counted_and_changed() -> None:
    cost = CostConfig.model_validate({"machines": {"A100-80G": {"price_per_hour": 1.0}}})
    assert parse_machine("8xA100-80G", cost) == (8, replace(MACHINES["A100-80G"], price_per_hour=1.0))
    assert parse_machine("L40S-48G", cost) == (1, MACHINES["L40S-48G"])
    own = {"bf16_tflops": 1.0, "fp32_tflops": 1.0, "memory_gb": 1.0, "price_per_hour": 1.0}
    assert machine_of(CostConfig.model_validate({"machines": {"own": own}}), "own").memory_gb == 1
    with pytest.raises(
        RequestError, match=r"unknown machine 'MI300X'; .*cost\.machines\.MI300X with bf16_tflops"
    ):
        machine_of(CostConfig(), "MI300X")
    with pytest.raises(RequestError, match=r"own is no known machine and lacks bf16_tflops, fp32_tflops"):
        machine_of(CostConfig.model_validate({"machines": {"own": {"price_per_hour": 1.0}}}), "own")


def test_a_campaign_is_the_sum_of_its_distinct_stages(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    config = parse_config(campaign, "c.yaml")
    plan = build_plan(config)
    stages = costed_stages(plan, campaign_stages(plan))
    count, machine = parse_machine("4xA100-80G", config.cost)
    one = estimate(config, stages, count, machine)
    # One evaluation holds one device, scoring two, recovery one; nothing but starts matters at this size.
    starts = {"score": 15 * 2, "recover": 45, "evaluate": 15, "export": 5}
    by_hand = sum(starts.get(costed.stage.kind, 0) for costed in stages) / 3600
    assert one.device_hours == pytest.approx(by_hand, rel=0.01)
    assert one.price == pytest.approx(by_hand * machine.price_per_hour, rel=0.01)
    # One trajectory: its stages come one after another, however many devices there are.
    times = {"score": 15, "recover": 45, "evaluate": 15, "export": 5}
    assert one.hours == pytest.approx(sum(times.get(c.stage.kind, 0) for c in stages) / 3600, rel=0.01)
    doubled = estimate(config, stages, count, machine, dict.fromkeys(starts, 2.0))
    assert doubled.device_hours == pytest.approx(2 * one.device_hours)
    campaign["methods"].append({**campaign["methods"][0], "name": "same"})
    twice = parse_config(campaign, "c.yaml")
    exports = 2 * 5 / 3600
    both = build_plan(twice)
    stages_of_both = costed_stages(both, campaign_stages(both))
    assert estimate(twice, stages_of_both, count, machine).device_hours == pytest.approx(
        one.device_hours + exports, rel=0.01
    )
    summary = plan_summary(plan, config, [(count, machine)], campaign_stages(plan))
    recovered = next(row for row in summary["kinds"] if row["kind"] == "recover")
    assert recovered["flops"] == summary["trajectories"][0]["recovery_flops"] > 0
    # Of each method, on one type of machine; what they share is the first one's.
    planned = campaign_stages(both)
    summary = plan_summary(both, twice, [(1, machine), (8, machine)], planned)
    assert summary["currency"] == "USD"
    first, second = summary["methods"]
    assert [each["method"] for each in (first, second)] == ["iterabre", "same"]
    (of_first,), (of_second,) = first["machines"], second["machines"]
    assert of_second["price"] == pytest.approx(exports * machine.price_per_hour, rel=0.01)
    assert of_first["price"] + of_second["price"] == pytest.approx(summary["machines"][0]["price"])


def test_generation_by_hand(info: ModelInfo) -> None:
    prompts = TextSpec(path="prompts.jsonl")
    spec = GenerationSpec(
        model=info.spec,
        prompts=prompts,
        max_prompts=10,
        responses_per_prompt=2,
        max_new_tokens=50,
        temperature=1.0,
    )
    stage = PlannedStage("generate", "key", 1, info.num_layers, spec, False)
    # 100 prompts of 20 tokens (80 bytes) each; two responses of 50 tokens to each of the first ten.
    cost = stage_cost(stage, SimpleNamespace(model=info), {prompts: TextSize(100, 100 * 80)})
    prefill = 4 * block_flops(info, 20 * 20, 20)
    decoding = 4 * block_flops(info, 20 * 50, 20 + 25)
    assert cost.flops == pytest.approx(prefill + decoding + head_flops(info, 20 + 20 * 50))
    assert cost.load_bytes == 4 * info.num_parameters < cost.memory_bytes


def test_a_limit_holds_for_each_task_of_a_group() -> None:
    assert task_tokens(["copa", "openbookqa"], None) == 100 * 22 + 500 * 24
    assert task_tokens(["copa", "blimp"], 300) == 100 * 22 + 67 * 300 * 21
    assert task_tokens(["somebody's"], None) == 1000 * 150


def test_a_linear_bridge_runs_both_models_forward_over_its_own_tokens(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["methods"][0]["recovery"] |= {"start": "linear_bridge", "start_tokens": 64}
    plan = build_plan(parse_config(campaign, "c.yaml"))
    (trajectory,) = plan.trajectories
    recoveries = [each for each in campaign_stages(plan)[trajectory.id] if each.kind == "recover"]
    start, training = recoveries[:2]
    info, length = trajectory.model, trajectory.method.recovery.sequence_length
    of_start = stage_cost(start, trajectory, plan.text_sizes).flops
    assert of_start == pytest.approx((info.num_layers + start.layers) * block_flops(info, 64.0, length))
    assert of_start < stage_cost(training, trajectory, plan.text_sizes).flops


def test_no_recovery_costs_nothing(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["methods"][0]["recovery"]["objective"] = "none"
    config = parse_config(campaign, "c.yaml")
    plan = build_plan(config)
    (row,) = plan_summary(plan, config, [], campaign_stages(plan))["trajectories"]
    assert (row["recovery_tokens"], row["recovery_flops"]) == (0, 0)


def test_what_a_run_has_spent_counts_a_shared_stage_once(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger"))
    for trajectory in ("a", "b"):
        common: dict[str, Any] = {
            "campaign": "c", "trajectory": trajectory, "model": "m", "method": "x", "seed": 0, "iteration": 1,
        }  # fmt: skip
        rows = [Row(**common, stage="score", key="shared", metric="seconds", value=1800.0)]
        rows.append(Row(**common, stage="recover", key=trajectory, metric="seconds", value=900.0))
        ledger.append(trajectory, rows)
    table = ledger.read()
    assert measured_seconds(table) == {
        ("score", "shared"): 1800,
        ("recover", "a"): 900,
        ("recover", "b"): 900,
    }
    devices = {"score": 1.0, TASK_SCORING: 8.0, "recover": 4.0}
    limits = Limits(price_per_hour=2.0, devices=devices)
    assert spent_before(table, limits) == 1.0 + 2 * 2.0
    by_task = replace(limits, held_kinds={("score", None, "x"): TASK_SCORING})
    assert spent_before(table, by_task) == 8.0 + 2 * 2.0
    solving = devices | {CLOSED_FORM: 1.0}
    in_closed_form = replace(limits, devices=solving, held_kinds={("recover", None, "x"): CLOSED_FORM})
    assert spent_before(table, in_closed_form) == 1.0 + 2 * 0.5


def test_epochs_end_a_recovery_before_its_tokens_do(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["methods"][0]["recovery"]["max_tokens"] = 10**9

    def flops(epochs: int | None) -> float:
        campaign["methods"][0]["recovery"]["epochs"] = epochs
        config = parse_config(campaign, "c.yaml")
        plan = build_plan(config)
        return plan_summary(plan, config, [], campaign_stages(plan))["trajectories"][0]["recovery_flops"]

    assert 0 < flops(1) < flops(2) < flops(None)
    assert flops(2) == pytest.approx(2 * flops(1))
