"""The grid of a campaign: which models, methods, seeds and targets meet."""

from collections.abc import Iterator

from actors.contracts import ModelInfo
from orchestrator.config import CampaignConfig, MethodConfig, SourceModelConfig
from orchestrator.errors import RequestError
from orchestrator.planning.pruning_schedule import IterationPlan, iterative_schedule, target_depth
from orchestrator.storage.layout import shortened


def trajectories_of(
    config: CampaignConfig, model: SourceModelConfig, method: MethodConfig, seed: int, info: ModelInfo
) -> Iterator[tuple[str, tuple[IterationPlan, ...]]]:
    """Yield one trajectory through all targets, or, if all layers go at once, one for each target.

    Raises:
        RequestError: a target that the model cannot be taken to.
    """
    base = f"{model.id}--{method.name}--seed{seed}"
    targets = [
        target
        for target in config.targets
        if not any(entry.matches(model.id, method.name, seed, target.name) for entry in config.exclude)
    ]
    depths = sorted({target_depth(target, info) for target in targets}, reverse=True)
    if method.schedule.mode == "direct":
        for depth in depths:
            yield shortened(f"{base}--{depth}L"), (IterationPlan(1, info.num_layers - depth, depth, True),)
    elif depths:
        schedule = method.schedule
        yield (
            shortened(base),
            iterative_schedule(
                info.num_layers,
                depths,
                schedule.layers_per_iteration,
                schedule.recover_at,
                config.evaluation_for(model).at,
            ),
        )


def check_exclusions(config: CampaignConfig) -> None:
    """Refuse an entry that excludes nothing, since most likely a name in it is misspelt.

    Raises:
        RequestError: shows the entry and the names there are.
    """
    for position, entry in enumerate(config.exclude):
        if not any(
            entry.matches(model.id, method.name, seed, target.name)
            for model in config.models
            for method in config.methods
            for seed in config.seeds
            for target in config.targets
        ):
            given = ", ".join(f"{name}: {value}" for name, value in entry if value is not None)
            known = [*(m.id for m in config.models), *(m.name for m in config.methods)]
            known += [target.name for target in config.targets]
            raise RequestError(f"exclude.{position} ({given}) matches no combination of {', '.join(known)}")
