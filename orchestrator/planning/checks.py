"""Checks of a plan that need a model's tokenizer, its positions or its modules, but none of its weights."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actors.contracts import (
    CLOSED_FORM_OBJECTIVES,
    AdapterSpec,
    EvaluationSpec,
    ModelInfo,
    ModelSpec,
    RecoverySpec,
    ScoreSpec,
    TextSpec,
)
from actors.data import calibration_sequences, open_records, tokenize_text
from actors.evaluation.probes.probes import probe_prompts
from actors.models import load_tokenizer
from actors.models.loading.load import empty_model, load_config
from actors.recovery import find_objective
from actors.recovery.adapters.lora import target_paths
from actors.recovery.training.deepspeed_config import (
    accumulation_steps,
    check_user_config,
    deepspeed_config,
    parse,
)
from actors.recovery.training.training_data import training_data
from actors.scoring import find_criterion
from orchestrator.config import TrainingConfig
from orchestrator.errors import RequestError
from orchestrator.planning.plan import TextSize, TrajectoryPlan

MOST_ROWS = 1000
"""Rows of a text that are tokenised for a check."""

MOST_BYTES = 4_000_000
"""The largest recovery text that is tokenised for a check."""


def check_deepspeed(trajectories: Sequence[TrajectoryPlan], training: TrainingConfig) -> None:
    """Check the user's DeepSpeed JSON by itself, and against the settings of every recovery.

    Raises:
        RequestError: names the file and the field.
    """
    if training.deepspeed is None:
        return
    file = f"execution.training.deepspeed {training.deepspeed!r}"
    with _placed(file):
        check_user_config(parse(trajectories[0].deepspeed))
    for trajectory in _methods(trajectories):
        spec = trajectory.recovery_spec(trajectory.dense)
        if find_objective(spec.objective).build is None:
            continue
        with _placed(f"method {trajectory.method.name!r}"):
            accumulation_steps(spec, training.workers)
            with _placed(file):
                deepspeed_config(spec, training.workers)


def check_inputs(
    trajectories: Sequence[TrajectoryPlan],
    teachers: Mapping[ModelSpec, ModelInfo],
    sizes: Mapping[TextSpec, TextSize],
) -> tuple[str, ...]:
    """Check that every model has rows for the tokens, and positions for the lengths, that it will be given.

    Args:
        teachers: other models to learn from.
        sizes: of all texts; a large recovery text is not tokenised.

    Returns:
        What is no fault and worth knowing.

    Raises:
        RequestError: names the model or method and the field.
    """
    notes: list[str] = []
    models = {**{t.model.spec: t.model for t in trajectories}, **teachers}
    tokenizers = {spec: load_tokenizer(spec) for spec in models}
    for trajectory in {t.model_id: t for t in trajectories}.values():
        with _placed(f"model {trajectory.model_id!r}"):
            spec, info = trajectory.evaluation, trajectory.model
            notes += check_evaluation(spec, info, tokenizers[info.spec])
    methods = _methods(trajectories)
    recovering = [t for t in methods if t.traits.applies_recovery]
    for scoring, trajectory in {t.score_spec(t.dense): t for t in methods}.items():
        with _method(trajectory):
            notes += check_calibration(scoring, trajectory.model, tokenizers[trajectory.model.spec])
    for trajectory in recovering:
        with _method(trajectory):
            notes += _check_recovery_lengths(trajectory, [models[spec] for spec in _readers(trajectory)])
            notes += _bridge_notes(trajectory)
            _check_vocabularies(_readers(trajectory), tokenizers)
    for reading, trajectory in {_reading(t): t for t in recovering}.items():
        with _method(trajectory):
            size = sizes.get(reading.data)
            small = size is not None and size.num_bytes is not None and size.num_bytes <= MOST_BYTES
            if small and not reading.data.streaming:
                largest = training_data(reading, tokenizers[trajectory.model.spec]).largest_id
                for reader in _readers(trajectory):
                    _check_tokens(largest, tokenizers[reader], models[reader], "recovery.data")
    for training, trajectory in {_targets(t): t for t in recovering}.items():
        with _method(trajectory):
            _check_targets(training)
    return tuple(dict.fromkeys(notes))


def _methods(trajectories: Sequence[TrajectoryPlan]) -> list[TrajectoryPlan]:
    """Return one trajectory of each model and method: seeds differ in nothing that is checked here."""
    return list({(t.model_id, t.method.name): t for t in trajectories}.values())


def _method(trajectory: TrajectoryPlan) -> AbstractContextManager[None]:
    return _placed(f"method {trajectory.method.name!r} on model {trajectory.model_id!r}")


def _readers(trajectory: TrajectoryPlan) -> list[ModelSpec]:
    """Return the models that read what recovery trains on: the source, and any other teacher."""
    teacher = trajectory.recovery_spec(trajectory.dense).teacher
    return [trajectory.model.spec, *([teacher] if teacher else [])]


def _reading(trajectory: TrajectoryPlan) -> RecoverySpec:
    """Return of the recovery's spec what its data depend on: methods that differ elsewhere are one."""
    recovery = trajectory.method.recovery
    data = trajectory.recovery_text
    return RecoverySpec(
        model=trajectory.dense,
        # Prompts are no data yet: the unpruned model answers them while the campaign runs.
        data=replace(data, streaming=True) if trajectory.traits.trains_on == "responses" else data,
        packing=recovery.packing,
        special_tokens=recovery.special_tokens,
        sequence_length=recovery.sequence_length,
        batch_size=recovery.batch_size,
        max_tokens=recovery.max_tokens,
    )


def check_layers(trajectory: TrajectoryPlan) -> None:
    """Check that the layers which may go are in the model, and are as many as its targets take.

    Raises:
        RequestError: names the field of the campaign file.
    """
    depth, scoring, protected = (
        trajectory.model.num_layers,
        trajectory.method.scoring,
        trajectory.protected_layers,
    )
    deepest = trajectory.iterations[-1].layers_left
    for name, layers in (("layers", scoring.layers), ("protected", protected)):
        beyond = [layer for layer in layers if not 0 <= layer < depth]
        if beyond:
            raise RequestError(f"scoring.{name} has {beyond[0]}; the model's layers are 0 to {depth - 1}")
    if twice := [layer for layer, times in Counter(scoring.layers).items() if times > 1]:
        raise RequestError(f"scoring.layers has {twice[0]} more than once")
    free = len(scoring.layers) if scoring.layers else depth - len(protected)
    if depth - deepest > free:
        what = f"scoring.layers lists {free}" if scoring.layers else f"scoring.protected leaves {free}"
        raise RequestError(
            f"the target of {deepest} layers takes {depth - deepest} of {depth} away, and {what}"
        )
    if not trajectory.iterations[0].layers_to_drop:
        _check_heals_as_it_is(trajectory)


def _check_heals_as_it_is(trajectory: TrajectoryPlan) -> None:
    """Refuse a target at which nothing is dropped and nothing is there to learn."""
    recovery, depth = trajectory.method.recovery, trajectory.model.num_layers
    if not trajectory.traits.applies_recovery:
        raise RequestError(f"the target of {depth} layers drops nothing, and recovery.objective is none")
    if recovery.objective in CLOSED_FORM_OBJECTIVES or recovery.start is not None:
        raise RequestError(f"the target of {depth} layers drops nothing, so that there is nothing to bridge")
    if find_objective(recovery.objective).has_teacher and recovery.teacher is None:
        raise RequestError(
            f"the target of {depth} layers drops nothing, so that the model would learn from itself; name "
            "the model that it was pruned from as recovery.teacher"
        )


def check_calibration(spec: ScoreSpec, info: ModelInfo, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Check the calibration text, as far as the criterion reads one; return what is worth knowing.

    Raises:
        RequestError: a token without a row in the embedding, or a sequence longer than the model takes.
    """
    if not find_criterion(spec.criterion).uses_sequences or spec.task is not None:
        return []
    most = min(spec.max_sequences or MOST_ROWS, MOST_ROWS)
    rows = list(islice((row for row in _rows(spec.calibration) if row.strip()), most))
    sequences = calibration_sequences(rows, tokenizer, spec.sequence_length)
    _check_tokens(max(map(_largest, sequences)), tokenizer, info, "scoring.calibration")
    longest = max(map(len, sequences))
    said = f"scoring.sequence_length {spec.sequence_length} lets the calibration text have {longest} tokens"
    return _check_length(longest, info, said)


def _check_recovery_lengths(trajectory: TrajectoryPlan, read_by: Sequence[ModelInfo]) -> list[str]:
    recovery, context = trajectory.method.recovery, trajectory.model.context_length
    new_tokens = recovery.generation.max_new_tokens
    if trajectory.generation_spec() is not None and context is not None and new_tokens >= context:
        raise RequestError(
            f"recovery.generation.max_new_tokens {new_tokens} leaves no room for a prompt in the {context} "
            f"positions of {trajectory.model.spec.path!r}; lower it"
        )
    said = f"recovery.sequence_length is {recovery.sequence_length}"
    return [note for info in read_by for note in _check_length(recovery.sequence_length, info, said)]


def _bridge_notes(trajectory: TrajectoryPlan) -> list[str]:
    """Note a linear map [D, D] that fewer than D tokens do not determine."""
    recovery, width = trajectory.method.recovery, trajectory.model.hidden_size
    bridges = CLOSED_FORM_OBJECTIVES.intersection((recovery.objective, recovery.start))
    given = "start_tokens" if recovery.start and recovery.start_tokens else "max_tokens"
    tokens = getattr(recovery, given)
    if not bridges or tokens >= width:
        return []
    return [
        f"method {trajectory.method.name!r}: recovery.{given} {tokens} is fewer than the "
        f"{width} numbers of a hidden state of {trajectory.model_id!r}: {min(bridges)} cannot be fitted to "
        "so few and may make the model worse; give many times as many tokens, or leave it out"
    ]


def _check_vocabularies(
    readers: Sequence[ModelSpec], tokenizers: Mapping[ModelSpec, PreTrainedTokenizerBase]
) -> None:
    """Refuse a teacher that reads other tokens than the student."""
    student, *teachers = readers
    for teacher in teachers:
        if tokenizers[student].get_vocab() != tokenizers[teacher].get_vocab():
            raise RequestError(
                f"recovery.teacher: the tokenizer of {teacher.path!r} is not that of {student.path!r}: "
                "their vocabularies differ; a teacher must read the same tokens"
            )


def _targets(trajectory: TrajectoryPlan) -> RecoverySpec:
    """Return of the recovery's spec what its adapter's targets depend on."""
    spec = trajectory.recovery_spec(trajectory.dense)
    kind, targets = spec.adapter.kind, spec.adapter.targets
    return RecoverySpec(
        model=spec.model,
        data=TextSpec(),
        objective=spec.objective,
        adapter=AdapterSpec(kind, targets=targets),
    )


def _check_targets(spec: RecoverySpec) -> None:
    """Refuse targets of the adapter that name no linear layer of the model."""
    if find_objective(spec.objective).build is None or spec.adapter.kind == "full":
        return
    source = spec.model.source
    with _placed("recovery.adapter.targets"):
        target_paths(empty_model(source, load_config(source)), spec.adapter.targets)


def _rows(text: TextSpec) -> Iterator[str]:
    return (record[text.text_column] for record in open_records(text))


def check_evaluation(
    evaluation: EvaluationSpec, info: ModelInfo, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Check texts, lengths and prompts of what is measured; return what is worth knowing.

    Raises:
        RequestError: names the field of the campaign file.
    """
    context = info.context_length
    for text in evaluation.perplexity:
        place = f"evaluation.perplexity {text.name!r}"
        ids = tokenize_text(islice(_rows(text.data), MOST_ROWS), tokenizer, text.max_tokens)
        if len(ids) < 2:
            raise RequestError(f"{place}: needs at least 2 tokens; the text has {len(ids)}")
        _check_tokens(_largest(ids), tokenizer, info, place)
        if context is not None and text.context > context:
            raise RequestError(
                f"{place}: a context of {text.context} tokens is more than the {context} positions of "
                f"{info.spec.path!r}; lower context"
            )
    if (
        (timed := evaluation.throughput)
        and context is not None
        and timed.context + timed.new_tokens > context
    ):
        raise RequestError(
            f"evaluation.throughput: context {timed.context} and new_tokens {timed.new_tokens} are more than "
            f"the {context} positions of {info.spec.path!r}; lower one of them"
        )
    prompts = [prompt for name in evaluation.probes for prompt in probe_prompts(name, tokenizer, evaluation)]
    notes = []
    if prompts:
        longest = max(map(len, prompts)) + evaluation.max_new_tokens
        said = (
            f"evaluation.max_new_tokens {evaluation.max_new_tokens} makes {longest} with the longest prompt"
        )
        notes += _check_length(longest, info, said)
    if evaluation.max_length is not None and evaluation.tasks:
        notes += _check_length(
            evaluation.max_length, info, f"evaluation.max_length is {evaluation.max_length}"
        )
    return notes


def _check_length(num_tokens: int, info: ModelInfo, said: str) -> list[str]:
    """Refuse an input longer than the model's table of positions; note one longer than its config names."""
    model = f"model {info.spec.path!r}"
    if info.position_limit is not None and num_tokens > info.position_limit:
        raise RequestError(f"{said}, but {model} has {info.position_limit} positions and no more; lower it")
    if info.context_length is not None and num_tokens > info.context_length:
        return [f"{said}, longer than the {info.context_length} tokens that {model} was made for"]
    return []


def _check_tokens(largest: int, tokenizer: PreTrainedTokenizerBase, info: ModelInfo, place: str) -> None:
    """Refuse a token that the embedding has no row for."""
    if largest >= info.vocab_size:
        raise RequestError(
            f"{place}: the tokenizer of {info.spec.path!r} gives the token "
            f"{tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), but the model's embedding has "
            f"{info.vocab_size} rows; use the tokenizer that belongs to the model"
        )


def _largest(ids: Tensor) -> int:
    return int(ids.max()) if ids.numel() else -1


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """Put the place in front of what a check says."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from error
