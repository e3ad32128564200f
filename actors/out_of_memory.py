"""What is done when memory does not suffice: once more with a smaller batch, then an error by name.

Recovery has its own way, which halves micro-batches without beginning again.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from actors.errors import IterabreError, MemoryExhaustedError, one_line

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

ALLOCATORS_SAY = ("can't allocate memory", "not enough memory", "CUDA out of memory")
"""How allocators that have no exception of their own say it."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether the exception is a lack of memory: Python's, torch's, or Ray's of a process it ended.

    Told by name, so that neither torch nor Ray need be loaded.
    """
    if error is None or (isinstance(error, IterabreError) and not isinstance(error, MemoryExhaustedError)):
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    by_name = {"MemoryError", "OutOfMemoryError", "MemoryExhaustedError"} & names
    return bool(by_name) or (isinstance(error, RuntimeError) and any(s in str(error) for s in ALLOCATORS_SAY))


def once_more_with_less(
    work: Callable[[int], ResultT], batch: int, *, what: str, setting: str, remedy: str
) -> ResultT:
    """Return `work(batch)`, or `work(batch // 2)` if memory does not suffice for the first.

    Args:
        work: computes with a batch of that size; the result does not depend on it.
        what: what is computed, for messages: "evaluation of 'model'".
        setting: the setting that holds the size of the batch.
        remedy: what else can be done.

    Raises:
        MemoryExhaustedError: half the batch does not fit either, or it cannot be halved.
    """
    try:
        return work(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = one_line(error)
    # Outside of the handler: the exception would keep alive what the failed work has allocated.
    half = batch // 2
    if half:
        log.warning("%s: out of memory (%s); once more with %s %d", what, said, setting, half)
        try:
            return work(half)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = one_line(error)
    tried = f"{setting} {half}" if half else f"{setting} 1"
    raise MemoryExhaustedError(f"{what}: memory does not suffice even with {tried} ({said}); {remedy}")
