"""Measures of what a layer, or its attention or MLP alone, does to the activations and the output."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from actors.models import text_config
from actors.models.head import LogitHead
from actors.scoring.measures.calibration import Calibration
from actors.scoring.measures.likelihood import divergences, negative_log_likelihoods
from actors.scoring.measures.pooling import POOLING
from actors.scoring.measures.wavefront import UNPRUNED


@torch.no_grad()
def hidden_cosine(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the cosine of the last hidden states of the reference and the model without layer i. [S, N]"""
    pool, rows = POOLING[calibration.pooling], calibration.no_rows(model)
    for positions, layers, reference_GTD, hidden_CGTD in _beside_reference(model, calibration):
        for g, position in enumerate(positions):
            similarity_C = pool(reference_GTD[g].float(), hidden_CGTD[:, g].float())
            rows[position, layers] = similarity_C.double().cpu()
    return rows


@torch.no_grad()
def kl(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the mean over tokens of KL(p_ref ‖ p), in nats, p predicted without layer i. [S, N]

    Every token counts, the last one too: its prediction is compared, not looked up in the text.
    """
    heads = (LogitHead(calibration.reference.model or model), LogitHead(model))
    vocabulary = text_config(model.config).vocab_size
    rows = calibration.no_rows(model)
    for positions, layers, reference_GTD, hidden_CGTD in _beside_reference(model, calibration):
        budget = calibration.memory_budget
        nats_CG = divergences(reference_GTD, hidden_CGTD, heads, vocabulary, budget).cpu()
        for g, position in enumerate(positions):
            rows[position, layers] = nats_CG[:, g]
    return rows


def _beside_reference(
    model: PreTrainedModel, calibration: Calibration
) -> Iterator[tuple[tuple[int, ...], list[int], Tensor, Tensor]]:
    """Yield last hidden states after the final norm, of the reference and of candidates, some at a time.

    Each time: positions of the sequences [G], layers that the candidates are without [C],
    the reference's states [G, T, D] and the candidates' [C, G, T, D].
    """
    reference = calibration.reference
    for wave in calibration.waves(model):
        sequences = [calibration.sequences[i] for i in wave.positions]
        known = reference.last_hiddens(sequences, calibration.memory_budget, calibration.counter)
        references: dict[int, Tensor] = {}  # the last hidden state [T, D] to keep, by sequence
        if known is not None:
            references |= zip(wave.positions, known, strict=True)
        for states in calibration.final_states(model, wave, keep_unpruned=known is None):
            hidden_CGTD = states.last_hidden()
            first = states.streams.count(UNPRUNED)
            if first:
                references |= zip(states.positions, hidden_CGTD[0].clone(), strict=True)
                for position in states.positions:
                    reference.keep(calibration.sequences[position], references[position])
            if layers := list(states.streams[first:]):
                reference_GTD = torch.stack([references[position] for position in states.positions])
                yield states.positions, layers, reference_GTD.to(hidden_CGTD.device), hidden_CGTD[first:]


@torch.no_grad()
def perplexity(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the mean negative log-likelihood, in nats, of the tokens 2..T without layer i. [S, N]

    Their mean over tokens becomes the perplexity (`LayerCriterion.link`). A sequence
    of one token predicts nothing: its row is 0 and weighs nothing.
    """
    rows = calibration.no_rows(model)
    for wave in calibration.waves(model):
        for states in calibration.final_states(model, wave, keep_unpruned=False):
            nats_CG = negative_log_likelihoods(states, calibration.sequences, calibration.memory_budget)
            for g, position in enumerate(states.positions):
                rows[position, list(states.streams)] = nats_CG[:, g].cpu()
    return rows


@torch.no_grad()
def block_influence(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return 1 − mean over tokens of the cosine of the stream before and after a block. [S, N]"""
    rows = calibration.no_rows(model)
    for passed in calibration.passed_blocks(model):
        leaving_GTD = passed.leaving_GTD.float()
        entering_GTD = passed.entering_GTD.to(leaving_GTD)
        similarity_G = cosine_similarity(entering_GTD, leaving_GTD, dim=-1).mean(-1)
        rows[list(passed.positions), passed.index] = (1 - similarity_G).double().cpu()
    return rows
