"""What an evaluation has measured so far, kept for one that goes on in its place after a kill."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from actors.artifacts import join, list_files, read_bytes, write_bytes
from actors.contracts import Metric, digest
from actors.errors import WorkError

REQUESTS_AT_ONCE = 2048
"""Requests of tasks that are kept together: what a kill loses of them, at most."""

log = logging.getLogger(__name__)


class KeptParts:
    """The finished parts of one evaluation, each a JSON file in a directory of its own.

    Args:
        uri: the directory, which belongs to this evaluation alone; nothing is kept without one.
    """

    def __init__(self, uri: str | None = None):
        self.uri = uri

    def metrics(self, part: str, measure: Callable[[], list[Metric]]) -> list[Metric]:
        """Return the metrics of a part, a text or a probe, kept or measured now."""
        name = f"metrics-{digest(part)[:16]}.json"
        if (kept := self.read(name)) is not None:
            return [Metric(**each) for each in kept]
        found = measure()
        self.write(name, [asdict(metric) for metric in found])
        return found

    def read(self, name: str) -> Any:
        """Return what a file holds; None if it is not there, or cannot be read."""
        if self.uri is None:
            return None
        try:
            return json.loads(read_bytes(join(self.uri, name)) or b"null")
        except (ValueError, WorkError) as error:
            log.warning("%s is measured again: %s", join(self.uri, name), error)
            return None

    def write(self, name: str, value: Any) -> None:
        """Write a file; a failure costs time after a kill and nothing else."""
        if self.uri is None:
            return
        try:
            write_bytes(join(self.uri, name), json.dumps(value).encode())
        except WorkError as error:
            log.warning("what the evaluation has measured is not kept: %s", error)


class KeptResponses:
    """The responses to requests of one kind, known again by the requests' content, however they are divided.

    Attributes:
        missing: positions of the requests that have no response yet.
    """

    def __init__(self, parts: KeptParts, kind: str, requests: Sequence[tuple[Any, ...]]):
        self._parts = parts
        # A request that is made twice, to be sampled twice, has two responses.
        times: Counter[str] = Counter()
        self._names: list[str] = []
        for request in requests:
            name = digest([kind, request])
            self._names.append(f"{name}-{times[name]}")
            times[name] += 1
        self._known: dict[str, Any] = {}
        for file in [] if parts.uri is None else list_files(parts.uri):
            if file.base_name.startswith("responses-"):
                self._known |= parts.read(file.base_name) or {}
        self.missing = [at for at, name in enumerate(self._names) if name not in self._known]

    def pieces(self) -> Iterator[list[int]]:
        """Yield the positions of missing requests to be responded to together; all if nothing is kept."""
        size = max(1, len(self.missing)) if self._parts.uri is None else REQUESTS_AT_ONCE
        for first in range(0, len(self.missing), size):
            yield self.missing[first : first + size]

    def add(self, positions: Sequence[int], responses: Sequence[Any]) -> None:
        """Keep the responses to the requests at those positions."""
        names = [self._names[at] for at in positions]
        added = dict(zip(names, responses, strict=True))
        self._known |= added
        self._parts.write(f"responses-{digest(names)[:16]}.json", added)

    def in_order(self) -> list[Any]:
        """Return the responses to all requests; none may be missing."""
        found = (self._known[name] for name in self._names)
        return [tuple(each) if isinstance(each, list) else each for each in found]
