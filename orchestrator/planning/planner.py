"""From a campaign file to its plan: everything is checked and decided before work starts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from actors.contracts import EvaluationSpec, ModelInfo, ModelRef, ModelSpec, TextInfo, TextSpec, extend
from actors.data import chat_template, describe_text
from actors.data.text import builtin_file
from actors.evaluation import check_probes, check_tasks, metric_names, suite_tasks, tasks_fingerprint
from actors.models import any_layers, check_prunable, describe_model, load_tokenizer
from actors.models.loading.licence import origin
from actors.models.pruning.merging import MERGES
from actors.recovery import check_data, check_recovery, find_objective
from actors.scoring import FixedCriterion, MergeCriterion, TaskCriterion, find_criterion
from orchestrator.config import (
    CampaignConfig,
    EvaluationConfig,
    MethodConfig,
    with_absolute_paths,
)
from orchestrator.errors import RequestError, unknown_name
from orchestrator.planning.checks import check_deepspeed, check_inputs, check_layers
from orchestrator.planning.grid import check_exclusions, trajectories_of
from orchestrator.planning.plan import CampaignPlan, TextSize, Traits, TrajectoryPlan
from orchestrator.planning.teaching import with_teacher_caches


def build_plan(config: CampaignConfig) -> CampaignPlan:
    """Resolve models, texts, tasks and targets of a campaign.

    Reads configurations and hashes files; loads no weights and starts nothing.

    Raises:
        RequestError: a model, text, task, criterion, objective or target that
            cannot be had, with the place in the config.
    """
    located = partial(with_absolute_paths, directories=config.directories)
    sources = {model.id: extend(ModelSpec, located(model)) for model in config.models}
    evaluations = {
        model.id: evaluation_spec(located(config.evaluation_for(model)), sources[model.id], min(config.seeds))
        for model in config.models
    }
    for evaluation in evaluations.values():
        check_tasks(evaluation.tasks, evaluation.include_path, evaluation.num_fewshot)
        check_probes(evaluation.probes)
    grid = [
        (model, located(config.method_for(model, method)))
        for model in config.models
        for method in config.methods
    ]
    for model, method in grid:
        _check_scoring(method, evaluations[model.id].include_path)
        check_data(method.recovery.objective, extend(TextSpec, method.recovery.data))
    infos = {name: describe_model(source) for name, source in sources.items()}
    origins = {name: origin(info.spec) for name, info in infos.items()}
    free = {name: any_layers(info.spec) for name, info in infos.items()}
    deepspeed = _read_deepspeed(located(config.execution.training).deepspeed)
    texts, teachers = _texts_and_teachers([method for _, method in grid], evaluations.values())
    found = {text: info.spec for text, info in texts.items()}
    evaluations = {name: _with_fingerprints(spec, found) for name, spec in evaluations.items()}
    described: list[TextInfo | ModelInfo] = [*texts.values(), *teachers.values()]
    fingerprints = {info.spec: info.fingerprint for info in described}
    # Also by what is asked for, where that leaves the dtype to the checkpoint.
    fingerprints |= {spec: info.fingerprint for spec, info in teachers.items()}
    trajectories = tuple(
        TrajectoryPlan(
            id=trajectory_id,
            campaign=config.name,
            model_id=model.id,
            model=infos[model.id],
            method=method,
            seed=seed,
            iterations=iterations,
            evaluation=evaluations[model.id],
            also_before_recovery=config.evaluation_for(model).also_before_recovery,
            deepspeed=deepspeed,
            fingerprints=fingerprints,
            traits=_traits(method),
            any_layers=free[model.id],
            origin=origins[model.id],
            texts=found,
        )
        for model, method in grid
        for seed in config.seeds
        for trajectory_id, iterations in trajectories_of(config, model, method, seed, infos[model.id])
    )
    _check(config, trajectories)
    sizes = {spec: TextSize(text.num_rows, _text_bytes(spec)) for spec, text in texts.items()}
    trajectories, taught = with_teacher_caches(trajectories, sizes, config)
    notes = (*_search_notes(config, trajectories), *taught, *check_inputs(trajectories, teachers, sizes))
    return CampaignPlan(config.name, trajectories, sizes, notes)


def evaluation_spec(evaluation: EvaluationConfig, model: ModelSpec, seed: int) -> EvaluationSpec:
    """Return the evaluation's spec for the unpruned model, with the members of suites among the tasks."""
    members = suite_tasks(evaluation.suites, evaluation.task_suffix)
    shots = evaluation.num_fewshot
    return extend(
        EvaluationSpec,
        evaluation,
        model=ModelRef(model),
        tasks=tuple(dict.fromkeys((*members, *evaluation.tasks))),
        num_fewshot=tuple(shots.items()) if isinstance(shots, dict) else shots,
        batch_size=None if evaluation.batch_size == "auto" else evaluation.batch_size,
        seed=seed,
    )


def _check(config: CampaignConfig, trajectories: Sequence[TrajectoryPlan]) -> None:
    """Check that there is something to run, and that every model can be pruned and recovered as planned.

    How much a model can lose is read from its config alone. A scheduler's metric has to be of what
    every evaluation measures.
    """
    check_exclusions(config)
    if not trajectories:
        raise RequestError("`exclude` leaves nothing to run; take an entry out")
    removals = {(t.model.spec, t.model.num_layers - t.iterations[-1].layers_left) for t in trajectories}
    for spec, count in removals:
        check_prunable(spec, count)
    training = config.execution.training
    check_deepspeed(trajectories, training)
    for trajectory in trajectories:
        method = trajectory.method
        try:
            check_layers(trajectory)
            check_recovery(trajectory.recovery_spec(trajectory.dense), training.workers)
            if method.recovery.start is not None:
                find_objective(method.recovery.start)
            if trajectory.recovery_text.conversations:
                chat_template(load_tokenizer(trajectory.model.spec), trajectory.recovery_text)
        except RequestError as error:
            raise RequestError(f"method {method.name!r}: {error}") from error
    if config.search.scheduler != "none":
        for evaluation in {trajectory.evaluation for trajectory in trajectories}:
            _check_metric(config.search.metric, evaluation)


def _search_notes(config: CampaignConfig, trajectories: Sequence[TrajectoryPlan]) -> list[str]:
    """Return what is worth knowing of a scheduler that can give up nothing."""
    compared = [i for t in trajectories for i in t.iterations[:-1] if i.is_measured]
    if config.search.scheduler == "none" or compared:
        return []
    return [
        f"search.scheduler {config.search.scheduler!r} will give up no trajectory: none is measured before "
        "its last iteration; set evaluation.at: every_iteration, or add targets"
    ]


def _check_metric(metric: str, evaluation: EvaluationSpec) -> None:
    """Refuse a metric of the search that no evaluation measures.

    What a task measures is known when it has run, so there only the task's name is checked.
    """
    names, open_subjects = metric_names(evaluation)
    subject, _, measure = metric.partition("/")
    if metric not in names and not (measure and subject in open_subjects):
        raise unknown_name("search.metric", metric, [*names, *(f"{name}/…" for name in open_subjects)])


def _check_scoring(method: MethodConfig, include_path: str | None) -> None:
    """Refuse a criterion that is not known, or that lacks what it needs."""
    scoring = method.scoring
    if wrong := _misfit(method):
        raise RequestError(f"method {method.name!r}: the criterion {scoring.criterion!r} {wrong}")
    if scoring.merge is not None and scoring.merge.variant not in MERGES:
        raise unknown_name("scoring.merge.variant", scoring.merge.variant, MERGES)
    if scoring.task is not None:
        check_tasks((scoring.task.name,), include_path)


def _misfit(method: MethodConfig) -> str | None:
    """Return what does not go with the method's criterion, in words that follow its name."""
    scoring = method.scoring
    criterion = find_criterion(scoring.criterion, scoring.pooling)
    if isinstance(criterion, TaskCriterion) and scoring.task is None:
        return "needs scoring.task"
    if scoring.task is not None and not isinstance(criterion, TaskCriterion):
        return "has no use for scoring.task; leave it out"
    if scoring.merge is not None and not isinstance(criterion, MergeCriterion):
        return "has no use for scoring.merge; leave it out"
    if isinstance(criterion, FixedCriterion) and not scoring.layers:
        return "needs scoring.layers"
    if scoring.layers and not isinstance(criterion, FixedCriterion):
        return "chooses the layers itself; leave out scoring.layers, or set criterion: fixed"
    if scoring.protected and isinstance(criterion, FixedCriterion):
        return "takes the layers of scoring.layers and no others; leave out scoring.protected"
    if scoring.protected and isinstance(criterion, MergeCriterion):
        return "has scoring.merge.lowest and highest for layers that stay; leave out scoring.protected"
    if isinstance(criterion, MergeCriterion) and method.schedule.mode != "direct":
        return "merges all layers at once; set schedule.mode: direct"
    if isinstance(criterion, MergeCriterion) and _applies_recovery(method):
        return "changes weights that recovery trains on; set recovery.objective: none"
    return None


def _traits(method: MethodConfig) -> Traits:
    criterion, objective = find_criterion(method.scoring.criterion), find_objective(method.recovery.objective)
    return Traits(criterion.seeded, criterion.chooses_run, objective.applies_recovery, objective.trains_on)


def _applies_recovery(method: MethodConfig) -> bool:
    return _traits(method).applies_recovery


def _texts_and_teachers(
    methods: Iterable[MethodConfig], evaluations: Iterable[EvaluationSpec]
) -> tuple[dict[TextSpec, TextInfo], dict[ModelSpec, ModelInfo]]:
    """Describe every text that is read, and every teacher that is no source model."""
    texts = {perplexity.data for evaluation in evaluations for perplexity in evaluation.perplexity}
    teachers = set()
    for method in methods:
        texts.add(extend(TextSpec, method.scoring.calibration))
        if _applies_recovery(method):
            texts.add(extend(TextSpec, method.recovery.data))
        if method.recovery.teacher is not None:
            teachers.add(extend(ModelSpec, method.recovery.teacher))
    return {text: describe_text(text) for text in texts}, {spec: describe_model(spec) for spec in teachers}


def _with_fingerprints(evaluation: EvaluationSpec, found: Mapping[TextSpec, TextSpec]) -> EvaluationSpec:
    perplexity = tuple(replace(text, data=found[text.data]) for text in evaluation.perplexity)
    folder = tasks_fingerprint(evaluation.include_path)
    return replace(evaluation, perplexity=perplexity, tasks_fingerprint=folder)


def _text_bytes(text: TextSpec) -> int | None:
    """Return the size of a text that lies in a file of this machine."""
    file = builtin_file(text.builtin) if text.builtin else Path(text.path or "").expanduser()
    return file.stat().st_size if file.is_file() else None


def _read_deepspeed(path: str | None) -> str:
    if path is None:
        return "{}"
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(
            f"execution.training.deepspeed: {path!r} cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"execution.training.deepspeed: {path!r} is not UTF-8 text: {error}") from error
