"""What is tried again when storage fails, and what the error says when that was in vain.

Tried again, with growing pauses, is what passes by itself: a store that asks to slow down, fails
inside or answers too late, connections that break, handles that an NFS server has forgotten. A missing
bucket, refused credentials and a full disk stay as they are, and end the work at once.
"""

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from actors.errors import IterabreError, StorageUnavailableError, WorkError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_VARIABLE = "ITERABRE_STORAGE_RETRY_S"
"""The variable that holds the driver's `storage.retry_s` for its workers."""
DEFAULT_PATIENCE_S = 600.0

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
JITTER_S = 1.0

PASSING = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}

PASSING_WORDS = re.compile(
    # pyarrow names the error of the SDK: AWS Error SLOW_DOWN during PutObject operation.
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|THROTTLING"
    r"|REQUEST_TIME_TOO_SKEWED)|HTTP status (429|5\d\d)|curlCode"
    r"|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED|ABORTED)"
    # obstore has the answer's status, or what went wrong with the connection.
    r"|status code: (408|429|5\d\d)|<Code>(RequestTimeout|SlowDown|InternalError|ServiceUnavailable)</Code>"
    r"|HTTP error|error sending request|error decoding response body|connection (closed|reset)"
    r"|(operation|request) timed out|timeout",
    re.IGNORECASE,
)


def patience_s() -> float:
    """Return for how many seconds an operation is tried again."""
    return float(os.environ.get(PATIENCE_VARIABLE, DEFAULT_PATIENCE_S))


def is_transient(error: BaseException) -> bool:
    """Return whether an operation that failed so may succeed a little later."""
    if isinstance(error, IterabreError):
        return isinstance(error, StorageUnavailableError)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in PASSING
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    from_library = isinstance(error, OSError) or type(error).__module__.startswith(("obstore", "botocore"))
    return from_library and PASSING_WORDS.search(str(error)) is not None


def attempt(place: str, doing: str, operation: Callable[[], T], limit_s: float | None = None) -> T:
    """Return what `operation` returns, tried again for as long as its failure is one that passes.

    Args:
        place: the file or directory that it works on, and `doing` what it does there, for the errors.
        limit_s: for how long; `storage.retry_s` if None.

    Raises:
        StorageUnavailableError: it still failed after that time.
        WorkError: it failed otherwise; names place and remedy.
        FileNotFoundError: there is no such file; what that means, the caller knows.
    """

    def note(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning(
            "cannot %s %s (%s); trying again in %.1f s",
            doing, place, _said(error) if error else "", state.upcoming_sleep,
        )  # fmt: skip

    trying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_delay(patience_s() if limit_s is None else limit_s),
        wait=wait_exponential_jitter(FIRST_PAUSE_S, LONGEST_PAUSE_S, jitter=JITTER_S),
        before_sleep=note,
        reraise=True,
    )
    with explained(place, doing):
        return trying(operation)


@contextmanager
def explained(place: str, doing: str) -> Iterator[None]:
    """Turn an error of storage into a `WorkError` that names place and remedy.

    A missing file stays a `FileNotFoundError`: its meaning depends on the caller.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("obstore", "botocore")):
            raise
        if is_transient(error):
            raise StorageUnavailableError(
                f"cannot {doing} {place}: the storage is away or overloaded ({_said(error)}). "
                "When it answers again, continue with --resume"
            ) from error
        remedies = {
            errno.ENOSPC: "the disk is full; free some space or move the storage path",
            errno.EDQUOT: "the disk quota is used up; free some space or move the storage path",
            errno.EACCES: "permission denied; give this user access or choose another path",
            errno.EPERM: "permission denied; give this user access or choose another path",
            errno.EROFS: "the file system is read-only; choose another path",
        }
        number = error.errno if isinstance(error, OSError) else None
        reason = remedies.get(number or 0, _said(error) if number is None else str(error))
        raise WorkError(f"cannot {doing} {place}: {reason}. Then continue with --resume") from error


def _said(error: BaseException) -> str:
    """Return what an error says in one line, without the dump of its parts that obstore adds."""
    return one_line(error).partition(" Debug source:")[0]
