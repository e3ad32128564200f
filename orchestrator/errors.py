"""The errors that deciding what to run can raise; the tree's root is in `actors.errors`."""

from actors.errors import (
    IterabreError,
    MemoryExhaustedError,
    RequestError,
    UnexpectedError,
    WorkError,
    unexpected,
    unknown_name,
)


class ConfigError(RequestError):
    """The YAML file or a `--set` override is wrong."""


class RunExistsError(RequestError):
    """The output directory holds another run, or the same run with other settings."""


class RunInUseError(RequestError):
    """Another driver has the run open."""


class ClusterTooSmallError(RequestError):
    """The cluster can never give what the configuration requests."""


class CorruptStageError(WorkError):
    """A stored stage result does not match its manifest."""


__all__ = [
    "ClusterTooSmallError",
    "ConfigError",
    "CorruptStageError",
    "IterabreError",
    "MemoryExhaustedError",
    "RequestError",
    "RunExistsError",
    "RunInUseError",
    "UnexpectedError",
    "WorkError",
    "unexpected",
    "unknown_name",
]
