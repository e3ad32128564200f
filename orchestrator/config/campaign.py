"""The campaign file as a whole: its grid of models, methods, targets and seeds."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from pydantic import Field, PrivateAttr, field_validator, model_validator

from actors.contracts import Name
from orchestrator.config.execution import CostConfig, ExecutionConfig, StorageConfig, TrackingConfig
from orchestrator.config.method import EvaluationConfig, MethodConfig, SourceModelConfig
from orchestrator.config.section import Section, reader

SectionT = TypeVar("SectionT", MethodConfig, EvaluationConfig)


class TargetConfig(Section):
    """A depth to stop at: exactly one of `layers`, `fraction`, `parameters` and `parameter_fraction`."""

    layers: int | None = Field(
        None, description="Layers to keep; all of a model that is pruned already, to heal it as it is."
    )
    fraction: float | None = Field(None, gt=0, lt=1, description="Share of the layers to remove.")
    parameters: float | None = Field(
        None, gt=0, description="Most parameters that may remain, whichever layers go; e.g. 1.0e9."
    )
    parameter_fraction: float | None = Field(
        None, gt=0, lt=1, description="Least share of the parameters to remove, whichever layers go."
    )

    @model_validator(mode="after")
    def _one_measure(self) -> "TargetConfig":
        if len(self._given()) != 1:
            raise ValueError(
                "give exactly one of `layers`, `fraction`, `parameters` and `parameter_fraction`"
            )
        return self

    def _given(self) -> list[tuple[str, float]]:
        return [(name, value) for name, value in self if value is not None]

    @property
    def name(self) -> str:
        """The target as it is written in `exclude` and in messages, e.g. `fraction=0.25`."""
        ((measure, value),) = self._given()
        return f"{measure}={value:g}"


class ExcludeConfig(Section):
    """Combinations that do not run: those that match all fields given here.

    `*` and `?` stand for any characters and any one character.
    """

    model: str | None = Field(None, description="Model id.")
    method: str | None = Field(None, description="Method name, e.g. `taylor*`.")
    seed: int | None = Field(None, description="Seed.")
    target: str | None = Field(None, description="Target as written: `layers=15`, `fraction=0.25`, …")

    @model_validator(mode="after")
    def _says_something(self) -> "ExcludeConfig":
        if all(value is None for _, value in self):
            raise ValueError("give at least one of `model`, `method`, `seed` and `target`")
        return self

    def matches(self, model: str, method: str, seed: int, target: str) -> bool:
        """Return whether that combination is excluded by this entry."""
        patterns = ((self.model, model), (self.method, method), (self.target, target))
        return self.seed in (None, seed) and all(
            pattern is None or fnmatchcase(name, pattern) for pattern, name in patterns
        )


class SearchConfig(Section):
    """How search spaces in methods are sampled, and which trajectories are given up early.

    In a method, any value may be `{grid: [a, b]}`, `{choice: [a, b]}`, `{uniform: [low, high]}`
    or `{loguniform: [low, high]}`.
    """

    samples: int = Field(
        1, ge=1, le=10_000, description="Draws of a method's spaces, for each point of its grids."
    )
    seed: int = Field(0, ge=0, description="Decides what is drawn.")
    scheduler: Literal["none", "asha", "median_stopping"] = Field(
        "none", description="Rule that stops trajectories between iterations, from the ledger."
    )
    metric: str = Field(
        "wikitext2/token_perplexity", description="What the scheduler compares, after recovery."
    )
    mode: Literal["min", "max"] = Field("min", description="Which values of the metric are good.")
    grace_iterations: int = Field(1, ge=1, description="Iterations that every trajectory may run.")
    reduction_factor: int = Field(3, ge=2, description="For asha: one in so many goes on.")


class CampaignConfig(Section):
    """One campaign: models × methods × seeds, with stops at the targets."""

    name: Name = Field(description="Name of the run; its directory under storage.path.")
    models: list[SourceModelConfig] = Field(min_length=1)
    methods: list[MethodConfig] = Field(min_length=1)
    targets: list[TargetConfig] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1, description="Every model and method runs once a seed.")
    exclude: list[ExcludeConfig] = Field([])
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    execution: ExecutionConfig = ExecutionConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    cost: CostConfig = CostConfig()
    _directories: tuple[str, ...] = PrivateAttr(default_factory=lambda: (os.getcwd(),))

    @property
    def directories(self) -> tuple[str, ...]:
        """Directories in which relative paths are looked for, in this order."""
        return self._directories

    def read_in(self, directories: Iterable[str]) -> "CampaignConfig":
        """Return the same campaign, with its relative paths looked for in these directories."""
        config = self.model_copy()
        config._directories = tuple(dict.fromkeys(map(os.path.abspath, directories)))
        return config

    @field_validator("seeds")
    @classmethod
    def _seeds_in_range(cls, seeds: list[int]) -> list[int]:
        if any(not 0 <= seed < 2**31 for seed in seeds):
            raise ValueError("a seed lies between 0 and 2147483647")
        return seeds

    @model_validator(mode="after")
    def _unique_names(self) -> "CampaignConfig":
        for kind, names in (
            ("model id", [m.id for m in self.models]),
            ("method name", [m.name for m in self.methods]),
            ("seed", [str(s) for s in self.seeds]),
            ("evaluation.perplexity name", [p.name for p in self.evaluation.perplexity]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{kind} {sorted(twice)[0]!r} stands there twice")
        return self

    @model_validator(mode="after")
    def _what_a_scheduler_needs(self) -> "CampaignConfig":
        if self.search.scheduler == "none":
            return self
        scheduler = f"search.scheduler {self.search.scheduler!r}"
        if self.execution.backend != "ray":
            raise ValueError(f"{scheduler} is Ray Tune's; use execution.backend ray or the scheduler none")
        if len(self.models) > 1:
            raise ValueError(
                f"{scheduler} compares trajectories of one model, and there are {len(self.models)}; "
                "use one model or the scheduler none"
            )
        return self

    def method_for(self, model: SourceModelConfig, method: MethodConfig) -> MethodConfig:
        """Return `method` with the model's overrides.

        Raises:
            ValidationError: an override is not what the method's section takes.
        """
        changes = model.overrides.model_dump(exclude={"evaluation"})
        return _overridden(method, changes) if any(changes.values()) else method

    def evaluation_for(self, model: SourceModelConfig) -> EvaluationConfig:
        """Return `evaluation` with the model's overrides.

        Raises:
            ValidationError: an override is not what the section takes.
        """
        changes = model.overrides.evaluation
        return _overridden(self.evaluation, changes) if changes else self.evaluation


def _overridden(section: SectionT, changes: dict[str, Any]) -> SectionT:
    kind = reader(type(section))
    return kind.validate_python(_merged(kind.dump_python(section), changes))


def _merged(old: Any, new: Any) -> Any:
    """Merge mappings field by field, but take a text, which has one source, as a whole."""
    if not isinstance(old, dict) or not isinstance(new, dict) or {"builtin", "path"} & new.keys():
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}
