"""Speed and memory of prefill and of decoding, models side by side (*Limits of Layer Pruning*, App. A.9).

Shape letters: B sequences, T tokens.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel

from actors.contracts import Metric, Progress, ThroughputSpec, no_progress
from actors.errors import RequestError
from actors.evaluation.probes.decoding import last_logits_only
from actors.models.offloading.dispatch import input_device

WARM_UPS = 1


@dataclass(frozen=True)
class Speed:
    """Medians over the runs of one model.

    `weight_bytes` and `cache_bytes` are what its weights and a full KV cache take;
    `peak_bytes` is the most that it held at once: of the GPU's memory, or, where
    there is none, the sum of the two.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class _Timing:
    prefill_s: float
    decode_s: float
    cache_bytes: int
    working_bytes: int


def measure_speed(
    models: Sequence[PreTrainedModel],
    input_ids: LongTensor,
    spec: ThroughputSpec,
    progress: Progress = no_progress,
) -> list[Speed]:
    """Measure the speed of each model on the same tokens, in this process.

    The models take turns, so that whatever else the machine does strikes all of
    them alike; the first round warms up and does not count. A run is one forward
    pass over `context` tokens and then `new_tokens` greedy steps, of which each
    sequence's end is not looked at.

    Args:
        models: on one device; they may share weights.
        input_ids: [T_total], at least `batch_size` × `context` tokens.

    Raises:
        RequestError: too few tokens, or more positions than a model has, or a model without a KV cache.
    """
    for model in models:
        check_length(model, spec)
    if len(input_ids) < spec.batch_size * spec.context:
        raise RequestError(
            f"throughput of {spec.batch_size} × {spec.context} tokens: the text has only {len(input_ids)}"
        )
    ids_BT = input_ids[: spec.batch_size * spec.context].view(spec.batch_size, spec.context)
    runs: list[list[_Timing]] = [[] for _ in models]
    num_runs = (WARM_UPS + spec.repeats) * len(models)
    for done in range(num_runs):
        progress(done, num_runs, "runs")
        turn = done % len(models)
        model = models[turn].eval()
        runs[turn].append(_run(model, ids_BT.to(input_device(model)), spec.new_tokens))
    progress(num_runs, num_runs, "runs")
    tokens = spec.batch_size * spec.context
    speeds = []
    for model, own in zip(models, runs, strict=True):
        counted = own[WARM_UPS:]
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        decode_s = statistics.median(run.decode_s for run in counted)
        speed = Speed(
            prefill_tokens_per_second=tokens / statistics.median(run.prefill_s for run in counted),
            decode_tokens_per_second=spec.batch_size * spec.new_tokens / decode_s,
            weight_bytes=weights,
            cache_bytes=max(run.cache_bytes for run in counted),
            peak_bytes=weights + max(run.working_bytes for run in counted),
        )
        speeds.append(speed)
    return speeds


def throughput(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    input_ids: LongTensor,
    spec: ThroughputSpec,
    progress: Progress = no_progress,
) -> list[Metric]:
    """Return metrics of `model` beside the unpruned `dense`, or of `model` alone if it is that (speed-ups 1).

    Raises RequestError as `measure_speed` does.
    """
    speeds = measure_speed([model] if dense is None else [model, dense], input_ids, spec, progress)
    own, base = speeds[0], speeds[-1]
    decode, prefill = own.decode_tokens_per_second, own.prefill_tokens_per_second
    return [
        Metric("throughput/prefill_tokens_per_second", prefill, "tokens/s"),
        Metric("throughput/decode_tokens_per_second", decode, "tokens/s"),
        Metric("throughput/prefill_speedup", prefill / base.prefill_tokens_per_second),
        Metric("throughput/speedup", decode / base.decode_tokens_per_second),
        Metric("throughput/weights", own.weight_bytes, "bytes"),
        Metric("throughput/kv_cache", own.cache_bytes, "bytes"),
        Metric("throughput/peak_memory", own.peak_bytes, "bytes"),
        Metric("throughput/peak_memory_ratio", own.peak_bytes / base.peak_bytes),
    ]


def check_length(model: PreTrainedModel, spec: ThroughputSpec) -> None:
    """Raise RequestError if the model has too few positions for `spec`."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and spec.context + spec.new_tokens > positions:
        raise RequestError(
            f"throughput with {spec.context} + {spec.new_tokens} tokens is more than the {positions} "
            "positions of the model; lower evaluation.throughput.context"
        )


@torch.inference_mode()
def _run(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int) -> _Timing:
    cuda = input_device(model).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = _now(cuda)
    output = model(ids_BT, use_cache=True, **last_logits_only(model))
    token_B1 = output.logits[:, -1:].argmax(-1)
    filled = _now(cuda)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise RequestError(
            f"model type {model.config.model_type!r} keeps no KV cache; leave evaluation.throughput out"
        )
    for _ in range(new_tokens):
        output = model(token_B1, past_key_values=cache, use_cache=True)
        token_B1 = output.logits[:, -1:].argmax(-1)
    ended = _now(cuda)
    working_bytes = torch.cuda.max_memory_allocated() - before if cuda else _cache_bytes(cache)
    return _Timing(filled - started, ended - filled, _cache_bytes(cache), working_bytes)


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _cache_bytes(cache: object) -> int:
    """Return the bytes of all keys and values; layers of other kinds hold their state otherwise."""
    tensors = [value for layer in getattr(cache, "layers", ()) for value in vars(layer).values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
