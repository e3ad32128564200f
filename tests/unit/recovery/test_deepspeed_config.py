"""A DeepSpeed JSON of the user: what goes with recovery, what `auto` means, and what is refused by name."""

import json
from dataclasses import replace
from typing import Any

import pytest

from actors.contracts import LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.errors import RequestError
from actors.recovery.training.deepspeed_config import (
    check_user_config,
    deepspeed_config,
    loss_scale_settings,
    optimizer_settings,
    parse,
    settings_fingerprint,
    zero_stage,
)

SPEC = RecoverySpec(
    model=ModelRef(ModelSpec("m")), data=TextSpec(path="t.txt"), batch_size=8, micro_batch_size=2
)

TRAINER: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The file for ZeRO-3 of transformers' documentation, without its scheduler."""


def _config(user: Any) -> dict[str, Any]:
    return deepspeed_config(replace(SPEC, deepspeed=json.dumps(user)), world_size=2)


def test_auto_is_what_recovery_sets_and_is_handed_to_nobody() -> None:
    config = _config(TRAINER)
    assert "auto" not in json.dumps(config)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (2, 1.0)
    assert config["zero_optimization"] == {
        name: value for name, value in TRAINER["zero_optimization"].items() if value != "auto"
    }
    assert config["steps_per_print"] == 2000


def test_auto_of_optimizer_and_loss_scale_is_their_default() -> None:
    user = {"fp16": {"enabled": "auto", "initial_scale_power": "auto", "loss_scale_window": 10}}
    spec = replace(SPEC, deepspeed=json.dumps(TRAINER | user))
    assert optimizer_settings(spec) == {}
    assert loss_scale_settings(spec) == {"loss_scale_window": 10}
    assert zero_stage(spec) == 3


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, ("'scheduler'", "lr_schedule and warmup_steps")),
        ({"amp": {"enabled": True}}, ("'amp'", "precision")),
        ({"zero_optimisation": {}}, ("'zero_optimisation' has no place", "did you mean zero_optimization")),
        ({"zero_optimization": {"stages": 2}}, ("'zero_optimization.stages'", "did you mean stage")),
        ({"zero_optimization": "stage2"}, ("'zero_optimization' must be a JSON object, not 'stage2'",)),
        ({"zero_optimization": {"stage": 4}}, ("'zero_optimization.stage' is 4", "0, 1, 2, 3")),
        ({"zero_optimization": {"stage": "auto"}}, ("'zero_optimization.stage' is 'auto'",)),
        ({"zero_optimization": {"stage": True}}, ("'zero_optimization.stage' is True", "whole number")),
        ({"zero_optimization": {"overlap_comm": "yes"}}, ("'zero_optimization.overlap_comm' is 'yes'",)),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, ("reduce_bucket_size' is '5e8'",)),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, ("reduce_bucket_size' is 0.5",)),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, ("offload_optimizer' must be a JSON object",)),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            ("offload_optimizer.device' is 'nvme'",),
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ("zero_quantized_weights'",)),
        ({"optimizer": "AdamW"}, ("'optimizer' must be a JSON object, not 'AdamW'",)),
        ({"optimizer": {"type": "Lamb"}}, ("'optimizer.type' is 'Lamb'", "always AdamW")),
        ({"optimizer": {"params": {"betas": [0.9]}}}, ("'optimizer.params.betas' is [0.9]",)),
        ({"optimizer": {"params": {"lr": 3e-4}}}, ("'optimizer.params.lr' is 0.0003", "learning_rate")),
        ({"optimizer": {"params": {"adam_w_mode": True}}}, ("'optimizer.params.adam_w_mode'",)),
        ({"fp16": True}, ("'fp16' must be a JSON object, not True",)),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ("'fp16.enabled' is True", "precision")),
        ({"fp16": {"hysteresis": 2}}, ("'fp16.hysteresis' has no place in recovery",)),
        ({"train_batch_size": 64}, ("'train_batch_size' is 64", "batch_size, which give 8")),
        ({"gradient_clipping": "none"}, ("'gradient_clipping' is 'none'", "a number")),
        ({"flops_profiler": {"enabled": True}}, ("'flops_profiler' has no place in recovery",)),
    ],
)
def test_what_has_no_place_is_refused_by_name(change: dict[str, Any], messages: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as refused:
        _config(change)
    for message in messages:
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1,\n}', "line 3 column 1"),
        ("[1]", "must be a JSON object, not list"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' stands there twice"),
        ('{"gradient_clipping": NaN}', "NaN is no number"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_json_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(RequestError, match="DeepSpeed configuration") as refused:
        parse(text)
    assert message in str(refused.value)


def test_null_is_nothing() -> None:
    check_user_config({"scheduler": None, "optimizer": None, "zero_optimization": {"sub_group_size": None}})
    assert _config({"zero_optimization": {"stage": 2, "sub_group_size": None}})["zero_optimization"] == {
        "stage": 2
    }


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({"objective": "healing"}, "ef81f4ce49ba61c9"),
        ({"loss": LossSpec(0.0, 0.0, 1.0)}, "13630b5a771ad0b8"),
        ({"loss": LossSpec(last_hidden_state="before_norm")}, "adce747f68df8382"),
    ],
)
def test_checkpoints_of_version_0_1_0_are_gone_on_from(settings: dict[str, Any], recorded: str) -> None:
    """Fields that it did not have, at what it did, are not in the fingerprint of a training's settings."""
    spec = RecoverySpec(model=ModelRef(ModelSpec("x"), (2,)), data=TextSpec(path="a.txt"), **settings)
    assert settings_fingerprint(spec).startswith(recorded)


def test_checkpoints_of_another_loss_are_not() -> None:
    spec = RecoverySpec(model=ModelRef(ModelSpec("x"), (2,)), data=TextSpec(path="a.txt"))
    assert not settings_fingerprint(spec).startswith("adce747f68df8382")
