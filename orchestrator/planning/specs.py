"""From sections of the campaign file to the specs that the rooms take."""

from actors.contracts import (
    AdapterSpec,
    EvaluationSpec,
    LossSpec,
    ModelRef,
    ModelSpec,
    PerplexitySpec,
    RecoverySpec,
    TextSpec,
    ThroughputSpec,
)
from actors.evaluation import suite_tasks
from orchestrator.config import EvaluationConfig, MethodConfig, ModelConfig, TextConfig


def model_spec(model: ModelConfig) -> ModelSpec:
    """The model's spec, from its section of the campaign file."""
    return ModelSpec(model.path, model.dtype, model.revision, model.trust_remote_code)


def text_spec(text: TextConfig) -> TextSpec:
    """The text's spec, from its section of the campaign file."""
    return TextSpec(**text.model_dump())


def recovery_spec(model: ModelRef, method: MethodConfig, seed: int, deepspeed: str = "{}") -> RecoverySpec:
    """The recovery's spec, from its section of the campaign file."""
    recovery = method.recovery
    given = {
        name: value
        for name, value in recovery.model_dump().items()
        if name not in {"data", "loss", "adapter", "start", "generation", "teacher", "teacher_layers"}
    }
    adapter = recovery.adapter.model_dump()
    targets = adapter.pop("targets")
    return RecoverySpec(
        model=model,
        data=text_spec(recovery.data),
        loss=LossSpec(**recovery.loss.model_dump()),
        adapter=AdapterSpec(**adapter, targets=targets if isinstance(targets, str) else tuple(targets)),
        teacher=None if recovery.teacher is None else model_spec(recovery.teacher),
        teacher_layers=None if recovery.teacher_layers is None else tuple(recovery.teacher_layers),
        seed=seed,
        deepspeed=deepspeed,
        **given,
    )


def evaluation_spec(evaluation: EvaluationConfig, seed: int) -> EvaluationSpec:
    """The evaluation's spec, from its section of the campaign file; the model is filled in later."""
    members = suite_tasks(evaluation.suites, evaluation.task_suffix)
    shots = evaluation.num_fewshot
    return EvaluationSpec(
        model=ModelRef(ModelSpec("")),
        perplexity=tuple(
            PerplexitySpec(p.name, text_spec(p.data), p.context, p.max_tokens) for p in evaluation.perplexity
        ),
        tasks=tuple(dict.fromkeys((*members, *evaluation.tasks))),
        suites=tuple(evaluation.suites),
        task_suffix=evaluation.task_suffix,
        include_path=evaluation.include_path,
        limit=evaluation.limit,
        num_fewshot=tuple(shots.items()) if isinstance(shots, dict) else shots,
        apply_chat_template=evaluation.apply_chat_template,
        max_length=evaluation.max_length,
        batch_size=None if evaluation.batch_size == "auto" else evaluation.batch_size,
        seed=seed,
        probes=tuple(evaluation.probes),
        max_new_tokens=evaluation.max_new_tokens,
        allow_code_execution=evaluation.allow_code_execution,
        throughput=ThroughputSpec(**evaluation.throughput.model_dump()) if evaluation.throughput else None,
    )
