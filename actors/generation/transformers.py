"""Responses of the unpruned model to prompts (*Limits of Layer Pruning* §4: self-generated responses).

Shape letters: B sequences of a batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from actors.contracts import GenerationSpec, ModelRef, digest
from actors.generation.prompts import encode_prompts
from actors.generation.responses import Prompt, Response, Shard
from actors.models import build_model, places, text_config
from actors.models.decoding import end_tokens, plain_greedy

PADDING = 0


class TransformersEngine:
    """The model in this process."""

    def __init__(self, spec: GenerationSpec):
        self._spec = spec
        self._model, self._tokenizer = build_model(ModelRef(spec.model), places())

    def respond(self, shard: Shard) -> list[Response]:
        return generate_responses(self._model, self._tokenizer, shard.prompts, self._spec, shard.first)


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    spec: GenerationSpec,
    first: int = 0,
) -> list[Response]:
    """Generate `spec.responses_per_prompt` responses to each prompt; in the order of the prompts.

    What is drawn depends on `spec.seed`, the prompt's number (`first` is that of
    the first) and the response's, never on the batch that a prompt is in. Logits
    do differ with the batch in their last bits, so a response can part from
    another batch's where two tokens are as good as equally likely.

    Prompts that cannot be answered follow at the end, see `encode_prompts`.

    Raises:
        RequestError: no chat template.
    """
    context = getattr(text_config(model.config), "max_position_embeddings", None)
    ids, left_out = encode_prompts(prompts, tokenizer, spec, first, context)
    jobs = [(i, k) for i in ids for k in range(spec.responses_per_prompt)]
    # Prompts of like length share a batch, so that little of it is padding.
    by_length = sorted(jobs, key=lambda job: (-len(ids[job[0]]), job))
    ends = end_tokens(model, tokenizer)
    responses: dict[tuple[int, int], Response] = {}
    for at in range(0, len(by_length), spec.batch_size):
        batch = by_length[at : at + spec.batch_size]
        seeds = [int(digest([spec.seed, first + i, k])[:15], 16) for i, k in batch]
        completed = _complete(model, [ids[i] for i, _ in batch], ends, seeds, spec)
        for (i, k), new_ids in zip(batch, completed, strict=True):
            text = tokenizer.decode(new_ids, skip_special_tokens=True).strip()
            responses[i, k] = Response(prompts[i], text, new_ids[-1] in ends, len(new_ids))
    return [responses[job] for job in jobs] + left_out


def _complete(
    model: PreTrainedModel,
    prompts: list[list[int]],
    ends: list[int],
    seeds: list[int],
    spec: GenerationSpec,
) -> list[list[int]]:
    """Return the new token ids of each sequence, up to and with the one that ends it."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[PADDING] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask_BT = torch.tensor(
        [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device
    )
    settings = {
        "max_new_tokens": spec.max_new_tokens,
        "eos_token_id": ends or None,
        "pad_token_id": PADDING,
    }
    draws = LogitsProcessorList()
    if spec.temperature:
        nucleus = [TopPLogitsWarper(spec.top_p)] if spec.top_p < 1 else []
        draws += [TemperatureLogitsWarper(spec.temperature), *nucleus, GumbelDraw(seeds, model.device)]
    with torch.no_grad(), plain_greedy(model, **settings) as config:
        out_BT = model.generate(
            ids_BT, attention_mask=mask_BT, generation_config=config, logits_processor=draws
        )
    completed = []
    for row in out_BT[:, longest:].tolist():
        end = next((position for position, token in enumerate(row) if token in ends), len(row) - 1)
        completed.append(row[: end + 1])
    return completed


class GumbelDraw(LogitsProcessor):
    """Adds Gumbel noise: the largest sum is a draw from the softmax of the logits.

    Each sequence has a generator of its own, so its draws do not depend on the batch. The noise is drawn
    where the logits are: copying it there would take longer than the model's step.
    """

    def __init__(self, seeds: list[int], where: torch.device | None = None):
        where = where or torch.device("cpu")
        self._generators = [torch.Generator(where).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_BV = torch.empty(scores.shape, device=scores.device)
        for row_V, generator in zip(noise_BV, self._generators, strict=True):
            row_V.uniform_(generator=generator)
        noise_BV.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_().log_().neg_()
        return scores + noise_BV
