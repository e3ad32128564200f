"""The fields that a DeepSpeed JSON may hold for a recovery, and their types."""

import math
from collections.abc import Mapping
from typing import Any

from actors.errors import RequestError, unknown_name

AUTO = "auto"
"""What transformers' Trainer fills in: here, what recovery sets, or DeepSpeed's own default."""

Fields = Mapping[str, str | Mapping[str, Any]]
"""A kind by name, or the fields of a section."""

_OFFLOAD = {"device": "text", "pin_memory": "flag", "buffer_count": "count", "nvme_path": "text"}
_ZERO_KINDS = {
    "flag": "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
    "overlap_comm round_robin_gradients ignore_unused_parameters elastic_checkpoint load_from_fp32_weights "
    "memory_efficient_linear log_trace_cache_warnings legacy_stage1 compute_grad_norm parameter_alignment "
    "pipeline_loading_checkpoint override_module_apply enable_sanity_checks "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential",
    "count": "stage reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_module_granularity_threshold",
}
FIELDS: Fields = {
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "count"
    ),
    **dict.fromkeys(
        ("wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients", "disable_allgather"),
        "flag",
    ),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), "flag"),
    "gradient_clipping": "number",
    "gradient_predivide_factor": "number",
    "steps_per_print": "count",
    "optimizer": {
        "type": "text",
        "params": {
            "lr": "number",
            "weight_decay": "number",
            "betas": "betas",
            "eps": "number",
            "torch_adam": "flag",
        },
    },
    "fp16": {"enabled": "flag", "initial_scale_power": "count", "loss_scale_window": "count"},
    "bf16": {"enabled": "flag"},
    "zero_optimization": {
        **{name: kind for kind, names in _ZERO_KINDS.items() for name in names.split()},
        "offload_optimizer": {
            **_OFFLOAD,
            **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init"), "flag"),
            "ratio": "number",
        },
        "offload_param": {**_OFFLOAD, "buffer_size": "count", "max_in_cpu": "count"},
    },
}

KINDS = {
    "flag": "true or false",
    "count": "a whole number of at least 0",
    "number": "a number of at least 0",
    "text": "a text",
    "betas": "two numbers from 0 to below 1",
}


def check_fields(section: Mapping[str, Any], known: Fields = FIELDS, within: str = "") -> None:
    """Check names and types of all fields; `auto` and null stand for what is not given.

    Raises:
        RequestError: a field that has no place in recovery, or another type than DeepSpeed takes.
    """
    for name, value in section.items():
        dotted = f"{within}{name}"
        if name not in known:
            place = f" under {within.removesuffix('.')!r}" if within else ""
            raise RequestError(
                f"DeepSpeed field {dotted!r} has no place in recovery; leave it out "
                f"({unknown_name(f'field{place}', name, known)})"
            )
        kind = known[name]
        if value is None or value == AUTO:
            continue
        if isinstance(kind, str):
            if not _is(kind, value):
                raise RequestError(f"DeepSpeed field {dotted!r} is {value!r}; it takes {KINDS[kind]}")
        elif isinstance(value, dict):
            check_fields(value, kind, f"{dotted}.")
        else:
            raise RequestError(f"DeepSpeed field {dotted!r} must be a JSON object, not {value!r}")


def _is(kind: str, value: Any) -> bool:
    if kind == "betas":
        return isinstance(value, list) and len(value) == 2 and all(_is("number", b) and b < 1 for b in value)
    if kind in ("flag", "text"):
        return isinstance(value, bool if kind == "flag" else str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # JSON writes 5e8 for a count of elements.
    return 0 <= value < math.inf and (kind == "number" or value == int(value))


def without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section, and the sections in it, with only the fields that have a value."""
    return {
        name: without_auto(value) if isinstance(value, dict) else value
        for name, value in section.items()
        if value is not None and value != AUTO
    }
