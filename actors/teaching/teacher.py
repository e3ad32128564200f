"""The teacher's pass over training data: what recoveries read in place of running it.

Shape letters: B sequences of a batch, T tokens, N tokens of a shard end to end, D hidden, V vocabulary,
K most likely tokens.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.artifacts import publish_file
from actors.contracts import (
    LOG_PROBABILITIES_DTYPE,
    FileRef,
    ModelRef,
    Progress,
    TeachResult,
    TeachSpec,
    no_progress,
)
from actors.data import TokenBatch, TrainingData
from actors.data.teacher_states import (
    HIDDEN,
    TOKENS,
    TOP_IDS,
    TOP_LOG_PROBABILITIES,
    entering,
    shard_file,
    write_shard,
)
from actors.errors import RequestError
from actors.models import LayerwisePass, build_model, find_layers, places
from actors.models.head import LogitHead
from actors.out_of_memory import once_more_with_less
from actors.recovery import check_vocabulary, training_data
from actors.recovery.training.document_isolation import check_document_isolation
from actors.teaching.shards import Shard, batch_sizes, run_shards

CHUNK_TOKENS = 256
"""Tokens whose logits exist at a time, for `top_k`."""


class Teacher:
    """The loaded teacher of one spec, and the data that it is run on.

    Raises:
        RequestError: data or model cannot be had, or do not go together.
    """

    def __init__(self, spec: TeachSpec):
        self._spec = spec
        # In the type that recoveries load it in, so that what is stored is what they would compute.
        model, tokenizer = build_model(ModelRef(replace(spec.model, dtype=spec.precision)), places())
        self._model = model.requires_grad_(False).eval()
        self._data = training_data(spec.reading(), tokenizer)
        check_vocabulary(self._data, self._model)
        if spec.packing == "documents":
            check_document_isolation(self._model)
        layers = len(find_layers(self._model).modules)
        if wrong := [block for block in spec.entering if not 0 <= block < layers]:
            raise RequestError(
                f"recovery.teacher_cache_blocks has {wrong[0]}, but the blocks of {spec.model.path!r} are 0 "
                f"to {layers - 1}"
            )

    @property
    def lengths_S(self) -> Tensor:
        return self._data.lengths_S

    def publish(self, shard: Shard, uri: str) -> FileRef:
        """Compute the states of a shard and store them as a file of the artifact at `uri`."""
        states = teach(self._model, self._data, self._spec, shard)
        with TemporaryDirectory(prefix="iterabre-teacher-") as scratch:
            path = Path(scratch) / shard_file(shard.number)
            write_shard(path, states)
            return publish_file(path, uri)


@torch.no_grad()
def teach(model: PreTrainedModel, data: TrainingData, spec: TeachSpec, shard: Shard) -> dict[str, Tensor]:
    """Return what is to be stored of a shard, by the names of `actors.data.teacher_states`."""
    parts: dict[str, list[Tensor]] = {}
    ids = torch.arange(shard.first, shard.first + shard.count)
    for chosen_B in ids.split(spec.batch_size):
        batch = data.batch(chosen_B).to(model.device)
        is_token_BT = torch.ones_like(batch.input_ids_BT) if batch.mask_BT is None else batch.mask_BT
        for name, value_BTX in _states(model, batch, spec):
            parts.setdefault(name, []).append(value_BTX[is_token_BT.bool()].cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _states(model: PreTrainedModel, batch: TokenBatch, spec: TeachSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield what is stored of a batch [B, T, ...], padding included; as recovery computes it."""
    stored = getattr(torch, spec.states)
    precision = getattr(torch, spec.precision)
    yield TOKENS, batch.input_ids_BT.int()
    with torch.autocast(model.device.type, dtype=precision, enabled=precision != torch.float32):
        layerwise = LayerwisePass(model, batch.input_ids_BT, batch.mask_BT, batch.position_ids_BT)
        hidden_BTD = layerwise.hidden_BTD
        for block in range(len(find_layers(model).modules)):
            if block in spec.entering:
                yield entering(block), hidden_BTD.to(stored)
            hidden_BTD = layerwise.block(block, hidden_BTD)
        hidden_BTD = layerwise.finish(hidden_BTD)
        if spec.top_k is None:
            yield HIDDEN, hidden_BTD.to(stored)
            return
        top = [_top_k(LogitHead(model), rows_ND, spec.top_k) for rows_ND in _chunks(hidden_BTD)]
    shape = hidden_BTD.shape[:2]
    yield TOP_IDS, torch.cat([ids_NK for ids_NK, _ in top]).unflatten(0, shape).int()
    log_probabilities_NK = torch.cat([values_NK for _, values_NK in top])
    yield TOP_LOG_PROBABILITIES, log_probabilities_NK.unflatten(0, shape)


def _chunks(hidden_BTD: Tensor) -> tuple[Tensor, ...]:
    return hidden_BTD.flatten(0, 1).split(CHUNK_TOKENS)


def _top_k(head: LogitHead, hidden_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ids and log-probabilities [N, K] of the most likely next tokens, likeliest first."""
    log_probabilities_NV = head(hidden_ND).float().log_softmax(-1)
    values_NK, ids_NK = log_probabilities_NV.topk(min(k, log_probabilities_NV.shape[-1]))
    return ids_NK, values_NK.to(getattr(torch, LOG_PROBABILITIES_DTYPE))


def teach_locally(spec: TeachSpec, uri: str, progress: Progress = no_progress) -> TeachResult:
    """Run the teacher in this process and publish its states at `uri`.

    Raises:
        RequestError: wrong data or blocks, or no room for the states.
    """

    def run(spec: TeachSpec) -> TeachResult:
        teacher = Teacher(spec)
        return run_shards(
            spec,
            teacher.lengths_S,
            lambda shards: ((shard, teacher.publish(shard, uri)) for shard in shards),
            uri,
            progress,
        )

    return once_more_with_less(run, **batch_sizes(spec))
