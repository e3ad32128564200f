"""The model whose output is to be kept: its last hidden states, computed once for all that is scored by them.

They do not depend on what is scored. They stay in this process for all waves of a
scoring and, where the model is known by its contents, on this node for later ones: for
the next iterations, for other methods and for other actors.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from actors.artifacts import cache_dir, cache_entry
from actors.artifacts.objects import open_then_rename
from actors.contracts import digest
from actors.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from actors.scoring.measures.kept_streams import KeptStreams
    from actors.scoring.measures.wavefront import ForwardCounter

log = logging.getLogger(__name__)

FOLDER = "reference-states"
KEPT_BYTES = 8 * 2**30
"""What a node keeps of them; those that were read least recently go."""


@dataclass(frozen=True)
class Reference:
    """Last hidden states after the final norm, [T, D] a sequence, each computed once.

    Attributes:
        load: gives the model, where it is another than the scored one.
        kept_as: names the model, and what else its states depend on, for those that this node keeps;
            None keeps them in this process alone.
        states: what is known in this process, by the hash of the token ids.
        kept: where the model's streams stay on the way to its last states, if it is scored, too.
    """

    load: "Callable[[], PreTrainedModel] | None" = None
    kept_as: str | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    kept: "KeptStreams | None" = None

    @cached_property
    def model(self) -> "PreTrainedModel | None":
        """The model, or None if it is the scored one; loaded when first asked for."""
        return None if self.load is None else self.load()

    def given_by(self, load: "Callable[[], PreTrainedModel]", kept: "KeptStreams | None") -> "Reference":
        """Return the same states, of a model that is given in another way."""
        return replace(self, load=load, kept=kept)

    def find(self, sequences: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the states of all sequences, [T, D] each, or None if one is not known."""
        found = [self._find(digest(ids_T.tolist())) for ids_T in sequences]
        return None if any(hidden is None for hidden in found) else [h for h in found if h is not None]

    def keep(self, ids_T: Tensor, hidden_TD: Tensor) -> None:
        """Keep the states of a sequence."""
        name = digest(ids_T.tolist())
        self.states[name] = hidden_TD.cpu().clone()
        if self.kept_as is None:
            return
        # A cache that cannot be written is no reason to fail: they are computed again.
        with suppress(OSError, RequestError):
            file = cache_entry(FOLDER, self._file_name(name))
            _make_room(file.parent, self.states[name].nbytes)
            with open_then_rename(file) as target:
                target.write(save({"states": self.states[name].contiguous()}))

    def last_hiddens(
        self, sequences: Sequence[Tensor], budget: int | None, counter: "ForwardCounter"
    ) -> list[Tensor] | None:
        """Return the states of all sequences, computed where they are not known.

        None if they are not known and the scored model, which takes them along, has to give them.
        """
        from actors.scoring.measures.wavefront import last_hiddens

        missing = [ids_T for ids_T in sequences if self.find([ids_T]) is None]
        if missing and self.model is None:
            return None
        if missing and self.model is not None:
            computed = last_hiddens(self.model, missing, budget=budget, counter=counter, kept=self.kept)
            for ids_T, hidden_TD in zip(missing, computed, strict=True):
                self.keep(ids_T, hidden_TD)
        return self.find(sequences)

    def _find(self, name: str) -> Tensor | None:
        if name not in self.states and self.kept_as is not None:
            file = cache_dir() / FOLDER / self._file_name(name)
            with suppress(OSError, SafetensorError, KeyError):
                self.states[name] = load_file(file)["states"]
                file.touch()
        return self.states.get(name)

    def _file_name(self, name: str) -> str:
        return f"{digest([self.kept_as, name])}.safetensors"


def _make_room(folder: Path, num_bytes: int) -> None:
    """Remove the states that were read least recently until so many bytes more fit."""
    stamped = []
    for file in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):
            status = file.stat()
            stamped.append((status.st_mtime, status.st_size, file))
    excess = sum(size for _, size, _ in stamped) + num_bytes - KEPT_BYTES
    for _, size, file in sorted(stamped):
        if excess <= 0:
            return
        log.info("removing %s: other states need its space", file)
        file.unlink(missing_ok=True)
        excess -= size
