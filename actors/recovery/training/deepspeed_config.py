"""The DeepSpeed configuration of a recovery: the user's JSON, completed by what the settings imply."""

import json
from dataclasses import replace
from typing import Any, cast

from actors.contracts import Dtype, ModelSpec, RecoverySpec, TextSpec, digest, to_json
from actors.contracts.settings import Settings, unused_later
from actors.errors import RequestError
from actors.recovery.training.deepspeed_fields import AUTO, check_fields, without_auto

ZERO_STAGES = (0, 1, 2, 3)
PRECISIONS = ("float32", "bfloat16", "float16")
PRECISION_SECTIONS = {"fp16": "float16", "bf16": "bfloat16"}
LOSS_SCALE_FIELDS = ("initial_scale_power", "loss_scale_window")
OPTIMIZER_FIELDS = ("betas", "eps")
DERIVED = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size / (micro_batch_size * workers)",
    "gradient_clipping": "max_grad_norm",
    "optimizer.type": "always AdamW",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler": "lr_schedule and warmup_steps",
    "fp16.enabled": "precision",
    "bf16.enabled": "precision",
}
"""DeepSpeed fields that follow from the recovery settings, and from which."""
UNSUPPORTED = {
    "torch_autocast": "precision",
    "amp": "precision",
    "data_types": "gradients are accumulated in float32",
    "communication_data_type": "gradients are exchanged in float32",
    "activation_checkpointing": "recovery.gradient_checkpointing",
    "zero_optimization.cpu_offload": "say it by offload_optimizer",
    "zero_optimization.zero_hpz_partition_size": "weights are sharded over all workers",
    **dict.fromkeys(
        (
            f"zero_optimization.zero_quantized_{part}"
            for part in ("weights", "nontrainable_weights", "gradients")
        ),
        "weights and gradients are exchanged as they are",
    ),
}
"""DeepSpeed fields that would undo what recovery does itself."""


TEACHER_CACHE = (
    "teacher_cache",
    "teacher_cache_dtype",
    "teacher_cache_blocks",
    "teacher_cache_gb",
    "teacher_top_k",
    "teacher_states",
)
"""Settings that change where the teacher's states come from; with `topk` alone what they are."""


def deepspeed_config(
    spec: RecoverySpec, world_size: int, micro_batch_size: int | None = None
) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Without optimizer and precision: `Engine` passes its own optimizer and uses autocast.

    Args:
        micro_batch_size: another than the one of `spec`, if that did not fit into memory.

    Raises:
        RequestError: the batch does not divide among the workers, or the user's
            JSON is none or contradicts the recovery settings.
    """
    user = parse(spec.deepspeed)
    check_user_config(user)
    _check_zero(spec, user)
    micro = micro_batch_size or spec.micro_batch_size
    ours = {
        "train_batch_size": spec.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation_steps(spec, world_size, micro),
        "gradient_clipping": spec.max_grad_norm,
    }
    wanted_by_name = {
        **ours,
        "optimizer.type": "AdamW",
        "optimizer.params.lr": spec.learning_rate,
        "optimizer.params.weight_decay": spec.weight_decay,
    }
    for name in DERIVED:
        given_by_user, value = _find(user, name)
        wanted = wanted_by_name.get(name)
        if (section := name.partition(".")[0]) in PRECISION_SECTIONS:
            wanted = precision_of(spec) == PRECISION_SECTIONS[section]
        if given_by_user and value not in (None, AUTO, wanted):
            given = "" if wanted is None else f", which give {wanted!r}"
            raise RequestError(
                f"DeepSpeed field {name!r} is {value!r}, but it follows from the recovery settings "
                f"({DERIVED[name]}{given}); leave it out or give 'auto'"
            )
    not_passed = {"optimizer", "scheduler", *PRECISION_SECTIONS}
    free = {name: value for name, value in without_auto(user).items() if name not in not_passed}
    # Offloading is meant for DeepSpeed's own Adam, which is compiled on first use; torch's serves as well.
    quiet = {
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_force_ds_cpu_optimizer": False,
        # It would wait for the device before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    return {**quiet, **free, **ours}


def check_user_config(user: dict[str, Any]) -> None:
    """Check the names and types of the user's fields, whatever the recovery settings are.

    Raises:
        RequestError: names the field that is wrong or has no place in recovery.
    """
    for name, why in UNSUPPORTED.items():
        if _find(user, name)[0]:
            raise RequestError(f"DeepSpeed field {name!r} does not go with recovery ({why}); leave it out")
    # The schedule follows from the recovery settings; any scheduler is refused below.
    check_fields({name: value for name, value in user.items() if name != "scheduler"})
    if user.get("scheduler") not in (None, AUTO):
        raise RequestError(
            f"DeepSpeed field 'scheduler' does not go with recovery ({DERIVED['scheduler']}); leave it out"
        )


def accumulation_steps(spec: RecoverySpec, world_size: int, micro_batch_size: int | None = None) -> int:
    """Return the number of micro-batches of one worker in one optimizer step.

    Raises:
        RequestError: the batch does not divide evenly.
    """
    micro = micro_batch_size or spec.micro_batch_size
    at_once = micro * world_size
    if at_once < 1 or spec.batch_size % at_once:
        raise RequestError(
            f"batch_size {spec.batch_size} is no multiple of micro_batch_size {micro} "
            f"x {world_size} workers = {at_once}; change one of the three"
        )
    return spec.batch_size // at_once


def largest_micro_batch(local_batch_size: int, at_most: int) -> int:
    """Return the largest micro-batch of at most `at_most` sequences that divides `local_batch_size`."""
    return next(
        size for size in range(max(1, min(local_batch_size, at_most)), 0, -1) if local_batch_size % size == 0
    )


def precision_of(spec: RecoverySpec) -> Dtype:
    """Return the name of the dtype that recovery computes in: by default that of the source's weights.

    Raises:
        RequestError: not a type that a model is trained in.
    """
    name = spec.precision or spec.model.source.dtype
    if name not in PRECISIONS:
        raise RequestError(f"recovery.precision {name!r} is none of {', '.join(PRECISIONS)}")
    return cast(Dtype, name)


def zero_stage(spec: RecoverySpec) -> int:
    """Return DeepSpeed's ZeRO stage: from 1 on optimizer state is sharded, from 2 gradients, at 3 weights."""
    stage: int = _section(parse(spec.deepspeed), "zero_optimization").get("stage", 0)
    return stage


def optimizer_settings(spec: RecoverySpec) -> dict[str, Any]:
    """Return the user's settings of AdamW beyond those of recovery."""
    params = _section(_section(parse(spec.deepspeed), "optimizer"), "params")
    return {name: params[name] for name in OPTIMIZER_FIELDS if params.get(name, AUTO) not in (None, AUTO)}


def loss_scale_settings(spec: RecoverySpec) -> dict[str, int]:
    """Return the user's settings of the loss scale of float16."""
    section = _section(parse(spec.deepspeed), "fp16")
    return {name: section[name] for name in LOSS_SCALE_FIELDS if section.get(name, AUTO) not in (None, AUTO)}


def settings_fingerprint(spec: RecoverySpec) -> str:
    """Hash the settings that must stay in a run: not where things are or how the work is cut."""
    same = replace(
        spec,
        model=replace(spec.model, source=ModelSpec(path=""), adapters=(), weights=None),
        data=TextSpec(),
        teacher=None,
        micro_batch_size=1,
        checkpoint_steps=1,
        gradient_checkpointing=False,
        teacher_states=None,
        precision=precision_of(spec),
        deepspeed=json.dumps([optimizer_settings(spec), loss_scale_settings(spec)]),
    )
    settings = to_json(same)
    # Absent when checkpoints were written from which training may still resume.
    del settings["data"]["fingerprint"], settings["data"]["template"], settings["data"]["max_bad_rows"]
    del settings["attention_implementation"]
    for name in TEACHER_CACHE:
        if name != "teacher_top_k" or spec.teacher_cache != "topk":
            del settings[name]
    _remove_unused_later(same, settings)
    if not spec.takes_last_state_after_norm:
        del settings["loss"]["last_hidden_state"]
    return digest(settings)


def _remove_unused_later(settings: Settings, as_json: dict[str, Any]) -> None:
    """Remove the fields that earlier versions did not have, at the values that mean what those did."""
    for name in unused_later(settings):
        del as_json[name]
    for name, section in vars(settings).items():
        if isinstance(section, Settings) and name in as_json:
            _remove_unused_later(section, as_json[name])


def parse(text: str) -> dict[str, Any]:
    """Parse the user's DeepSpeed JSON.

    Raises:
        RequestError: it is not a JSON object, or has a field twice; names the line.
    """
    try:
        config = json.loads(text or "{}", object_pairs_hook=_unique_fields, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the DeepSpeed configuration is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RequestError(f"the DeepSpeed configuration must be a JSON object, not {type(config).__name__}")
    return config


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of those pairs; DeepSpeed refuses a name that stands there twice, and so do we."""
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"field {repeated[0]!r} stands there twice")
    return dict(pairs)


def _reject_constant(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _find(config: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Return whether there is a field of that dotted name, and its value."""
    first, _, rest = name.partition(".")
    if first not in config:
        return False, None
    value = config[first]
    return _find(value, rest) if rest and isinstance(value, dict) else (not rest, value)


def _check_zero(spec: RecoverySpec, user: dict[str, Any]) -> None:
    zero = _section(user, "zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, float) or stage not in ZERO_STAGES:
        raise RequestError(
            f"DeepSpeed field 'zero_optimization.stage' is {stage!r}; there are "
            f"{', '.join(map(str, ZERO_STAGES))}"
        )
    if stage == 3 and spec.adapter.kind == "qlora":
        raise RequestError(
            "DeepSpeed field 'zero_optimization.stage' is 3, but 4-bit weights (recovery.adapter.kind: "
            "qlora) cannot be sharded; use stage 2, or adapters of kind lora"
        )
    if stage == 3 and spec.adapter.dora:
        raise RequestError(
            "DeepSpeed field 'zero_optimization.stage' is 3, but recovery.adapter.dora needs whole weights "
            "for the length of their rows; use stage 2, or leave dora out"
        )
    for name in ("offload_optimizer", "offload_param"):
        device = _section(zero, name).get("device", "none")
        lowest = 1 if name == "offload_optimizer" else 3
        if device not in ("none", "cpu"):
            raise RequestError(
                f"DeepSpeed field 'zero_optimization.{name}.device' is {device!r}; "
                "recovery offloads to cpu only"
            )
        if device == "cpu" and stage < lowest:
            raise RequestError(
                f"DeepSpeed field 'zero_optimization.{name}' needs stage {lowest} or more, not {stage}"
            )


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
