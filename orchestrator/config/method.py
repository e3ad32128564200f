"""Models, methods and evaluation: the settings of `actors.contracts`, and when they apply."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Field

from actors.contracts import (
    Doc,
    EvaluationSettings,
    GenerationSettings,
    ModelSettings,
    Name,
    RecoverySettings,
    ScoringSettings,
)
from actors.contracts.settings import Checked
from orchestrator.config.section import Section

METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}")
"""Methods made from search spaces are called name--field=value."""


def _safe_method_name(value: object) -> object:
    if isinstance(value, str) and not METHOD_NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is no name of a method: letters, digits, '.', '_', '-', '=' and '+' only, at most 100"
        )
    return value


MethodName = Annotated[str, Checked(_safe_method_name)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelSettings):
    """A source model."""

    id: Annotated[Name, Doc("Short name used in results and paths.")]


class OverridesConfig(Section):
    """What is different for one model: fields that replace those of every method, or of `evaluation`.

    Sections are merged field by field, texts are replaced as a whole.
    """

    scoring: dict[str, Any] = Field({}, description="Fields of `methods.scoring`.")
    schedule: dict[str, Any] = Field({}, description="Fields of `methods.schedule`.")
    recovery: dict[str, Any] = Field({}, description="Fields of `methods.recovery`.")
    evaluation: dict[str, Any] = Field({}, description="Fields of `evaluation`.")


@dataclass(frozen=True, kw_only=True)
class SourceModelConfig(ModelConfig):
    """A source model of the grid."""

    overrides: OverridesConfig = OverridesConfig()
    priority: Annotated[int, Doc("Its stages go before those of lower priority; added to the method's.")] = 0


class ScheduleConfig(Section):
    """In what portions layers go."""

    mode: Literal["iterative", "direct"] = Field(
        "iterative", description="Score again after every portion, or remove all at once."
    )
    layers_per_iteration: int = Field(1, ge=1, description="Layers removed between two scorings.")
    recover_at: Literal["every_iteration", "targets"] = Field(
        "every_iteration", description="Recover after every portion, or only where a target is reached."
    )


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig(RecoverySettings):
    """How a pruned model is healed. The defaults are the paper's (IteRABRe §4)."""

    start: Annotated[
        Literal["linear_bridge"] | None, Doc("What is done in closed form before the objective is trained.")
    ] = None
    start_tokens: Annotated[
        int | None, Ge(1), Doc("Tokens that `start` is fitted to; as many as max_tokens if not given.")
    ] = None
    generation: GenerationSettings = GenerationSettings()
    teacher: Annotated[ModelConfig | None, Doc("Learn from this model, not from the unpruned one.")] = None


class MethodConfig(Section):
    """A way to compress: criterion × schedule × recovery.

    A value anywhere in it may be a search space, see `search`.
    """

    name: MethodName = Field(description="Short name used in results and paths.")
    scoring: ScoringSettings = ScoringSettings()
    schedule: ScheduleConfig = ScheduleConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    priority: int = Field(
        0, description="Its stages go before those of lower priority; added to the model's."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EvaluationSettings):
    """What is measured, on the dense model and after every iteration."""

    at: Annotated[
        Literal["every_iteration", "targets"],
        Doc("Measure after every iteration, or only where a target is reached."),
    ] = "every_iteration"
    also_before_recovery: Annotated[bool, Doc("Measure the pruned model before it is healed, too.")] = True
