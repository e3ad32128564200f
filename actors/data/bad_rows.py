"""Rows of a text that cannot be used: skipped and counted, and refused where they are too many."""

import logging

from actors.contracts import RowCounts, TextSpec
from actors.errors import RequestError

log = logging.getLogger(__name__)

FEWEST_ROWS = 1000
"""Rows that a share is taken of while more are to come: wrong columns end a stream, a few bad rows do not."""
MOST_LOGGED = 5


class RowTally:
    """Counts the rows of a text while they are read.

    Attributes:
        place: the row that was read last, for messages: `row 3`, or `line 4, row 3`.
    """

    def __init__(self, text: TextSpec):
        self._text = text
        self._read = self._bad = self._unanswered = self._reported = 0
        self._first: RequestError | None = None
        self.place = ""

    def at(self, row: int, line: int | None) -> None:
        """Note that the next row is read; `row` counts from 0, `line` is that of its file from 1."""
        self._read = row + 1
        self.place = f"row {row}" if line is None else f"line {line}, row {row}"

    def skip(self, problem: RequestError) -> None:
        """Count the row as one that cannot be used.

        Raises:
            RequestError: these are too many already.
        """
        self._bad += 1
        self._first = self._first or problem
        if self._bad <= MOST_LOGGED:
            log.warning("%s; the row is skipped", problem)
        self._check(max(self._read, FEWEST_ROWS))

    def skip_unanswered(self) -> None:
        """Count the row as a conversation in which nothing is left to be learnt."""
        self._unanswered += 1

    def finish(self) -> None:
        """Look at the share of bad rows after the last one.

        Raises:
            RequestError: it is larger than the text's `max_bad_rows`.
        """
        self._check(self._read)
        if self._bad > self._reported:
            self._reported = self._bad
            log.warning("%d of %d rows of %r skipped", self._bad, self._read, self._text.name)

    def counts(self) -> RowCounts:
        """Return the counts so far."""
        return RowCounts(self._read, self._bad, self._unanswered)

    def _check(self, rows: int) -> None:
        if self._first is not None and self._bad > self._text.max_bad_rows * rows:
            raise RequestError(
                f"{self._first}; rows that cannot be used so far: {self._bad} of {self._read}, more than "
                f"max_bad_rows: {self._text.max_bad_rows:g} allows; mend them, leave them out or raise it"
            ) from self._first
