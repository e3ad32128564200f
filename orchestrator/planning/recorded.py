"""What a run recorded when it began: its plans, and of what models and texts they are."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from actors.artifacts import list_files, read_bytes, write_bytes
from actors.contracts import ModelSpec, TextSettings, TextSpec, extend
from orchestrator.config import CampaignConfig, parse_config
from orchestrator.errors import ConfigError, RequestError, RunExistsError, unknown_name
from orchestrator.planning.changes import Change, Effect, Path, RunRecord, compare
from orchestrator.planning.plan import CampaignPlan, TrajectoryPlan
from orchestrator.storage.layout import PLAN_SUFFIX
from orchestrator.storage.run_manifest import existing_run, read_run
from orchestrator.storage.stage_manifest import installed_versions
from orchestrator.storage.stage_store import Store

WRITERS = 16
"""Plans that are written at a time: an object store takes as long for each as for all of these."""


def record_trajectories(store: Store, trajectories: Iterable[TrajectoryPlan]) -> None:
    """Write the plan of each trajectory into the run, in place of what an earlier version wrote."""

    def record(plan: TrajectoryPlan) -> None:
        content = json.dumps(plan.to_json(), indent=1, ensure_ascii=False)
        write_bytes(store.trajectory_plan_uri(plan.id), content.encode())

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(record, trajectories))


@dataclass(frozen=True)
class Recorded:
    """A run as it was recorded, with a plan of each of its models and methods."""

    record: RunRecord
    plans: Sequence[TrajectoryPlan]


def read_recorded(store: Store) -> Recorded | None:
    """Return what the run at `store` recorded, or None if there is no run.

    Runs of earlier versions may hold no plans that this one can read: then what lies behind a field of
    their configuration is not known.
    """
    stored = read_run(store)
    if stored is None:
        return None
    pairs = {(each.get("model"), each.get("method")): each for each in stored.get("trajectories") or ()}
    names = [str(each["trajectory"]) for each in pairs.values()]
    with ThreadPoolExecutor(WRITERS) as pool:
        plans = [plan for plan in pool.map(partial(_read_plan, store), names) if plan is not None]
    config = _with_defaults(stored["config"])
    return Recorded(record_of(config, plans, stored.get("versions") or {}), plans)


def _with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recorded configuration with the fields that came later at their defaults.

    A method that this version does not offer any more is left as it stands; so is all of a configuration
    that this version cannot read for another reason.
    """

    def read(methods: Sequence[Any]) -> dict[str, Any] | None:
        try:
            return parse_config({**config, "methods": methods}, "campaign.json").model_dump(mode="json")
        except ConfigError:
            return None

    if (known := read(config["methods"])) is not None:
        return known
    gone = [method for method in config["methods"] if read([method]) is None]
    known = read([method for method in config["methods"] if method not in gone])
    return config if known is None else {**known, "methods": [*known["methods"], *gone]}


def continue_plan(
    plan: CampaignPlan, config: CampaignConfig, store: Store
) -> tuple[CampaignPlan, list[Change]]:
    """Return the plan as it goes on from what the run at `store` recorded, and what has changed since."""
    if (recorded := read_recorded(store)) is None:
        return plan, []
    now = record_of(config.model_dump(mode="json"), plan.trajectories, installed_versions())
    changes = compare(recorded.record, now)
    going_on = tuple(trajectory.continued(recorded.plans) for trajectory in plan.trajectories)
    return replace(plan, trajectories=going_on), changes


def check_changes(store: Store, changes: Sequence[Change], accepted: bool) -> None:
    """Refuse changes that contradict what a run is of, unless they are accepted.

    Raises:
        RunExistsError: names the fields, and how to go on.
    """
    wrong = [change for change in changes if change.effect is Effect.CONTRADICTION]
    if wrong and not accepted:
        raise RunExistsError(
            f"{store.uri} is a run of something else:\n"
            + "\n".join(f"  {change}" for change in wrong)
            + "\nundo this (`revision` keeps a model or text of the hub at a commit), give another id to the "
            "model or another name to the campaign, or go on with --accept-changes, which computes anew what "
            "depends on it, under the same names"
        )


def record_of(
    config: Mapping[str, Any], plans: Iterable[TrajectoryPlan], versions: Mapping[str, str]
) -> RunRecord:
    """Return what a run of `config` is of, as its plans found it."""
    plans = list(plans)
    overrides = {model["id"]: model.get("overrides") or {} for model in config.get("models", ())}
    found = [each for plan in plans for each in _found_behind_fields(plan, overrides.get(plan.model_id, {}))]
    contents = {field: value for field, value, _ in found if value is not None}
    commits = {field: commit for field, _, commit in found if commit is not None}
    deepspeed = json.loads(plans[0].deepspeed) if plans else None
    return RunRecord(config, contents, deepspeed, versions, commits)


def _found_behind_fields(
    plan: TrajectoryPlan, overrides: Mapping[str, Any]
) -> Iterator[tuple[Path, str | None, str | None]]:
    """Yield each field that names a model, text or folder, with the hash of its content and its commit."""

    def field(place: Path, section: str, name: str) -> Path:
        if name in overrides.get(section, {}):
            return ("models", plan.model_id, "overrides", section, name)
        return (*place, name)

    def text(settings: TextSettings) -> tuple[str | None, str | None]:
        spec = extend(TextSpec, settings)
        return plan.fingerprints.get(spec), plan.texts.get(spec, spec).commit

    scoring, recovery, evaluation = plan.method.scoring, plan.method.recovery, plan.evaluation
    method: Path = ("methods", plan.method.name)
    yield ("models", plan.model_id), plan.model.fingerprint, plan.model.spec.commit
    yield field((*method, "scoring"), "scoring", "calibration"), *text(scoring.calibration)
    yield field((*method, "recovery"), "recovery", "data"), *text(recovery.data)
    if recovery.teacher is not None:
        wanted = extend(ModelSpec, recovery.teacher)
        teacher = next((spec for spec in plan.fingerprints if spec == wanted), None)
        if isinstance(teacher, ModelSpec):
            place = field((*method, "recovery"), "recovery", "teacher")
            yield place, plan.fingerprints[teacher], teacher.commit
    yield field(("evaluation",), "evaluation", "include_path"), evaluation.tasks_fingerprint, None
    for measured in evaluation.perplexity:
        place = (*field(("evaluation",), "evaluation", "perplexity"), measured.name)
        place = (*place, "data") if place[0] == "evaluation" else place
        yield place, *text(measured.data)


def _read_plan(store: Store, trajectory_id: str) -> TrajectoryPlan | None:
    content = read_bytes(store.trajectory_plan_uri(trajectory_id))
    try:
        return None if content is None else TrajectoryPlan.from_json(json.loads(content))
    except (ValueError, KeyError, TypeError):
        return None


def recorded_trajectory(store: Store, trajectory_id: str) -> TrajectoryPlan:
    """Return the plan of a trajectory as the run recorded it.

    Raises:
        RequestError: there is no run, no such trajectory, or an earlier version recorded no plan of it.
    """
    planned = existing_run(store).get("planned") or {}
    files = [info.base_name for info in list_files(store.trajectories_uri)]
    recorded = {name.removesuffix(PLAN_SUFFIX) for name in files if name.endswith(PLAN_SUFFIX)}
    if trajectory_id not in recorded | planned.keys():
        raise unknown_name("trajectory", trajectory_id, recorded | planned.keys())
    content = b""
    if trajectory_id in recorded:
        content = read_bytes(store.trajectory_plan_uri(trajectory_id)) or b""
    try:
        return TrajectoryPlan.from_json(json.loads(content))
    except ValueError as error:
        raise RequestError(
            f"{store.uri} holds no plan of {trajectory_id} that this version can read, as it was started by "
            "an earlier one; give the campaign's command again with --resume: it records the plan, and "
            "computes nothing that is finished"
        ) from error
