"""What is done when memory does not suffice: once more with less at a time, then an error by name.

Recovery has its own way, which halves micro-batches without beginning again.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from actors.errors import IterabreError, MemoryExhaustedError, one_line

log = logging.getLogger(__name__)

SizeT = TypeVar("SizeT")
ResultT = TypeVar("ResultT")

ALLOCATORS_SAY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",  # of CUDA's own calls, and of NCCL
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""How allocators that have no exception of their own say it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the exception is a lack of memory: Python's, torch's, or Ray's of a process it ended.

    Told by name, so that neither torch nor Ray need be loaded.
    """
    if isinstance(error, IterabreError):
        return False
    if {"MemoryError", "OutOfMemoryError"} & {kind.__name__ for kind in type(error).__mro__}:
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in ALLOCATORS_SAY)


def once_more_with_less(
    work: Callable[[SizeT], ResultT],
    size: SizeT,
    smaller: SizeT | None,
    *,
    what: str,
    setting: str,
    remedy: str,
) -> ResultT:
    """Return `work(size)`, or `work(smaller)` if memory does not suffice for the first.

    Args:
        work: computes so much at a time; the result does not depend on it.
        smaller: half of it; None if there is nothing to halve.
        what: what is computed, for messages: "evaluation of 'model'".
        setting: the setting that says how much is computed at a time.
        remedy: what else can be done, in words that follow "or".

    Raises:
        MemoryExhaustedError: what is smaller does not fit either.
    """
    try:
        return work(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = one_line(error)
    # Outside of the handler: the exception keeps alive what the failed work had allocated.
    if smaller is not None:
        log.warning("%s: out of memory (%s); once more with half of %s", what, said, setting)
        try:
            return work(smaller)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = one_line(error)
    tried = f"even with half of {setting}" if smaller is not None else f"with {setting} at its lowest"
    raise MemoryExhaustedError(
        f"{what}: memory does not suffice {tried} ({said}); set {setting} lower, or {remedy}"
    )
