"""Content-addressed stage results of one run, and of a cache that runs share: commit, load, peek.

A stage's key is a hash of everything its result depends on, so a result found
under its key is the result. No manifest, no result.
"""

import logging
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Self

from pyarrow.fs import LocalFileSystem

from actors.artifacts import (
    attempt,
    create_bytes,
    delete_directory,
    delete_file,
    filesystem,
    join,
    list_files,
    local_path,
    read_bytes,
    sha256_of,
    stored_files,
    without_empty_directories,
    write_bytes,
)
from actors.contracts import ArtifactRef
from actors.errors import RequestError, WorkError
from orchestrator.config import StorageConfig
from orchestrator.errors import CorruptStageError
from orchestrator.storage.layout import RunLayout
from orchestrator.storage.stage_manifest import (
    MANIFEST,
    ResultT,
    StoredStage,
    decode_stage,
    encode_stage,
    installed_versions,
)

log = logging.getLogger(__name__)

NOT_SHARED = ("export",)
"""Kinds of stages that are of one run: an export is a directory for people, with the run's own card."""

LAST_USE = "last_use"
"""The file beside the manifest of a cached stage that shows by its date when the stage was last used."""

FIRST_LOOK_S = 60.0
"""For how long storage that does not answer is tried before anything has started."""


class Store(RunLayout):
    """All that one run leaves behind.

    Args:
        verify: compare every byte of what is loaded with its manifest, not only sizes and ETags.
        cache: a directory or bucket whose stages are shared by key with other runs; exports are not.
    """

    def __init__(self, uri: str, verify: bool = False, cache: str | None = None) -> None:
        super().__init__(uri)
        self.verify = verify
        self.cache = None if cache is None else RunLayout(cache)

    @classmethod
    def of_config(cls, storage: StorageConfig, name: str, verify: bool = False) -> Self:
        """Return the store of the campaign `name`.

        Raises:
            RequestError: as `RunLayout.of_campaign`.
        """
        store = cls.of_campaign(storage.path, name)
        cached = None if storage.cache is None else RunLayout.of_storage(storage.cache, "storage.cache")
        return cls(store.uri, verify, cached)

    def payload_uri(self, kind: str, key: str, attempt: int) -> str:
        """Return the directory of an attempt's files, where the stage will be committed."""
        home = self._layouts(kind)[0]
        return RunLayout.payload_uri(home, kind, key, attempt)

    def commit(
        self,
        kind: str,
        key: str,
        result: ResultT,
        inputs: dict[str, Any],
        artifact: ArtifactRef | None,
        seconds: float,
        waited_s: float = 0.0,
    ) -> StoredStage[ResultT]:
        """Make a stage's result durable, by one object that is created only if there is none.

        `artifact` was published before, under `payload_uri` or `models_uri`. If the stage is already
        committed, by whomever, the first result stays and is returned.

        Raises:
            WorkError: the payload cannot be seen from here, or the disk is full.
        """
        home = self._layouts(kind)[0]
        stage = StoredStage(
            kind, key, result, artifact, inputs, seconds,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            versions=installed_versions(),
            waited_s=waited_s,
            etags=None if artifact is None else self._seen_payload(artifact, home.uri),
        )  # fmt: skip
        manifest = encode_stage(stage, home.uri)
        while not create_bytes(join(home.stage_uri(kind, key), MANIFEST), manifest):
            if (first := self.load(kind, key, type(result))) is not None:
                log.info("stage %s %s was committed by another; its result is taken", kind, key)
                return first
        return stage

    def load(self, kind: str, key: str, result_type: type[ResultT]) -> StoredStage[ResultT] | None:
        """Return a committed stage, or None if it has to run.

        The payload's files must have the sizes, and in an object store the ETags, that the manifest has
        for them; with `verify`, the hashes, too. If they do not, the stage's directory is quarantined with
        a warning, and the stage has to run again. Who uses a payload verifies it then.
        """
        for layout in self._layouts(kind):
            home = layout.stage_uri(kind, key)
            text = read_bytes(join(home, MANIFEST))
            if text is None:
                continue
            try:
                stage = decode_stage(text, layout.uri, home, result_type)
                if stage.artifact is not None:
                    check_payload(stage.artifact, stage.etags or {}, self.verify)
            except (CorruptStageError, FileNotFoundError, ValueError) as error:
                if read_bytes(join(home, MANIFEST)) == text:
                    quarantine_stage(layout, kind, key, str(error))
                continue
            if layout is self.cache:
                # For `iterabre cache prune`; a stage is of use without it.
                with suppress(WorkError):
                    write_bytes(join(home, LAST_USE), b"", limit_s=0)
            return stage
        return None

    def peek(self, kind: str, key: str, result_type: type[ResultT]) -> ResultT | None:
        """Return the result of a stage that looks committed, without a check of its payload or any change."""
        for layout in self._layouts(kind):
            home = layout.stage_uri(kind, key)
            if (text := read_bytes(join(home, MANIFEST))) is not None:
                with suppress(CorruptStageError, ValueError):
                    return decode_stage(text, layout.uri, home, result_type, checked=False).result
        return None

    def read_manifest(self, kind: str, key: str) -> bytes | None:
        """Return the manifest of a stage that looks committed, or None."""
        homes = (layout.stage_uri(kind, key) for layout in self._layouts(kind))
        return next(filter(None, (read_bytes(join(home, MANIFEST)) for home in homes)), None)

    def quarantine_artifact(self, uri: str) -> bool:
        """Quarantine the stage whose payload lies at `uri`; return false if none has its payload there."""
        for layout in filter(None, (self, self.cache)):
            beginning = join(layout.uri, "stages") + "/"
            kind, _, rest = uri.removeprefix(beginning).partition("/")
            key = rest.partition("/")[0]
            if uri.startswith(beginning) and key:
                quarantine_stage(layout, kind, key, f"the payload {uri} is not what was published")
                return True
        return False

    def drop_unfinished(self, kind: str, key: str) -> None:
        """Remove what a committed stage has kept of its work; a failure costs space and nothing else."""
        uri = self.train_uri(key) if kind == "recover" else self.parts_uri(key)
        try:
            delete_directory(uri)
        except WorkError as error:
            log.warning("what a finished stage needs no more remains in %s: %s", uri, error)

    def check_writable(self, needed_bytes: int = 0, limit_s: float = FIRST_LOOK_S) -> None:
        """Write and delete a small file; on a local disk, also check the free space.

        Args:
            limit_s: for how long storage that is away is tried again.

        Raises:
            RequestError: the storage path, or that of the cache, cannot be written or is too small.
        """
        if self.cache is not None:
            _write_probe(self.cache.uri, "storage.cache", limit_s)
        local = local_path(self.uri)
        if local is None:
            _write_probe(self.uri, "storage path", limit_s)
            return
        with without_empty_directories(local):
            _write_probe(self.uri, "storage path", limit_s)
            free_bytes = shutil.disk_usage(local).free
        if free_bytes < needed_bytes:
            raise RequestError(
                f"storage path {self.uri} has {free_bytes:,} bytes free, but about {needed_bytes:,} are "
                "needed; free some space or choose another storage.path"
            )

    def _layouts(self, kind: str) -> Sequence[RunLayout]:
        """Return where a stage of that kind may lie; new ones go to the first."""
        return (self,) if self.cache is None or kind in NOT_SHARED else (self.cache, self)

    def _seen_payload(self, artifact: ArtifactRef, root: str) -> dict[str, str]:
        """Check that the payload is seen from here; return the ETags of its files, where they have some."""
        if not artifact.uri.startswith((root + "/", self.uri + "/")):
            raise ValueError(f"payload {artifact.uri} was not published inside the run {self.uri}")
        seen = stored_files(artifact.uri)
        for file in artifact.files:
            if file.name not in seen or seen[file.name][0] != file.size_bytes:
                raise WorkError(
                    f"payload file {artifact.uri}/{file.name} was published by a worker but is not seen from "
                    f"{socket.gethostname()}; storage.path must be one that all nodes share "
                    "(NFS, s3:// or gs://)"
                )
        return {file.name: etag for file in artifact.files if (etag := seen[file.name][1]) is not None}


def check_payload(artifact: ArtifactRef, etags: Mapping[str, str], verify: bool) -> None:
    """Compare a payload's files with its manifest: names, sizes and ETags, and with `verify` every byte.

    A file with another ETag is read, too: a run that was copied to another bucket may have others.

    Raises:
        CorruptStageError: they differ.
    """
    seen = stored_files(artifact.uri)
    for file in artifact.files:
        size_bytes, etag = seen.get(file.name, (None, None))
        wrong = CorruptStageError(f"payload file {file.name} does not match the manifest")
        if size_bytes != file.size_bytes:
            raise wrong

        def hashed(name: str = file.name) -> tuple[str, int]:
            fs, root = filesystem(artifact.uri)
            with fs.open_input_stream(f"{root}/{name}") as stream:
                return sha256_of(stream)

        if not verify and etags.get(file.name, etag) == etag:
            continue
        if attempt(artifact.uri, "read", hashed) != (file.sha256, file.size_bytes):
            raise wrong


def quarantine_stage(layout: RunLayout, kind: str, key: str, reason: str) -> None:
    """Move a damaged stage out of the way, with a warning. A second caller finds nothing to move."""
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"
    source, target = layout.stage_uri(kind, key), layout.quarantine_uri(f"{kind}-{key}-{stamp}")

    def move() -> None:
        fs, source_path = filesystem(source)
        _, target_path = filesystem(target)
        if isinstance(fs, LocalFileSystem):
            fs.create_dir(os.path.dirname(target_path))
            with suppress(FileNotFoundError):
                os.rename(source_path, target_path)
            return
        # The manifest goes first: without it there is no result.
        for info in sorted(list_files(source, recursive=True), key=lambda file: file.base_name != MANIFEST):
            with suppress(FileNotFoundError):
                fs.copy_file(info.path, target_path + info.path.removeprefix(source_path))
                fs.delete_file(info.path)

    attempt(source, "quarantine", move)
    log.warning("stage %s %s is damaged (%s); quarantined in %s and run again", kind, key, reason, target)


def _write_probe(uri: str, what: str, limit_s: float) -> None:
    probe = join(uri, f".probe-{os.urandom(4).hex()}.tmp")
    try:
        write_bytes(probe, b"probe", limit_s=limit_s)
        delete_file(probe, limit_s=limit_s)
    except (OSError, WorkError) as error:
        raise RequestError(f"{what} {uri} cannot be written: {error}") from error
