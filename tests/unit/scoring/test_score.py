"""A whole `ScoreSpec`, in one process and in shards."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from actors.artifacts import publish
from actors.contracts import ArtifactRef, ModelRef, ModelSpec, ScoreResult, ScoreSpec, TextSpec
from actors.errors import RequestError
from actors.models import describe_model, load_model, remove_layers
from actors.scoring import Scorer, score, score_layers, score_locally
from actors.scoring.measures.memory_budget import GIB
from actors.scoring.score import Shard, ShardScores, run_shards
from tests.support.tiny_models import save_tiny, tiny_tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog .",
    "Ancient deities are the gods .",
    "Stability of the higher layer leads to greater stability of the lower layer .",
    "dog",
    "There is a way .",
    "The gods and goddesses worshipped in the ancient land .",
    "The fox .",
]
DROPPED = (1, 3)
KEPT = (0, 2, 4, 5)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ScoreSpec:
    """Seven sequences and an unpruned model of six layers."""
    directory = tmp_path_factory.mktemp("score")
    (directory / "calibration.txt").write_text("\n".join(LINES))
    path = save_tiny(directory / "model", num_layers=6)
    return ScoreSpec(
        model=ModelRef(ModelSpec(path)), calibration=TextSpec(path=str(directory / "calibration.txt"))
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """Rank 1 on the attention output of source layers 2 and 4: W + B·A."""
    directory = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=["o_proj"], layers_to_transform=[2, 4], layers_pattern="layers"
    )
    config.save_pretrained(str(directory))
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{factor}.weight": torch.ones(shape)
        for layer in (2, 4)
        for factor, shape in {"A": (1, 32), "B": (32, 1)}.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    return publish(directory, str(directory / "published"))


def _in_shards(spec: ScoreSpec, count: int, at_least: int = 1) -> ScoreResult:
    """As a pool of actors does it: every share by a scorer of its own, the last share first."""

    def compute(shards: list[Shard]) -> Iterator[tuple[Shard, ShardScores]]:
        return ((shard, Scorer(spec).score(shard)) for shard in reversed(shards))

    return run_shards(Scorer(spec), compute, count, at_least)


def test_an_unpruned_model(spec: ScoreSpec) -> None:
    heard: list[tuple[int, int, str]] = []
    result = score_locally(spec, lambda done, total, note: heard.append((done, total, note)))
    tokenizer = tiny_tokenizer()
    sequences = [torch.tensor(tokenizer(line).input_ids) for line in LINES]
    want = score_layers(load_model(spec.model.source.path)[0], sequences)
    assert result.scores == pytest.approx(want, abs=1e-6)
    assert result.source_layers == (0, 1, 2, 3, 4, 5)
    assert result.removal_order == tuple(sorted(range(6), key=lambda i: -want[i]))
    assert result.num_sequences == 7
    assert result.num_tokens == sum(len(sequence) for sequence in sequences)
    assert result.layer_forwards == 7 * 6 * 7 // 2
    assert heard == [(7, 7, "sequences")]


def test_progress_is_reported_between_shards(spec: ScoreSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "SEQUENCES_PER_LOCAL_SHARD", 3)
    heard: list[int] = []
    score_locally(spec, lambda done, _total, _note: heard.append(done))
    assert heard == [3, 5, 7]


@pytest.mark.parametrize(
    "criterion",
    ["hidden_cosine", "perplexity", "kl", "block_influence", "bridge_residual", "random", "deepest"],
)
def test_shards_do_not_matter(spec: ScoreSpec, criterion: str) -> None:
    spec = replace(spec, criterion=criterion, model=spec.model.without(DROPPED))
    whole = score_locally(spec)
    for count in (1, 2, 3, 7):
        shared = _in_shards(spec, count)
        assert shared.scores == pytest.approx(whole.scores, abs=1e-6)
        assert replace(shared, scores=()) == replace(whole, scores=())


@pytest.mark.parametrize("criterion", ["hidden_cosine", "perplexity", "kl"])
@pytest.mark.parametrize("reference", ["source", "current"])
def test_candidates_are_shared_where_sequences_are_few(
    spec: ScoreSpec, criterion: str, reference: str
) -> None:
    spec = replace(spec, criterion=criterion, reference=reference, max_sequences=2)
    spec = replace(spec, model=spec.model.without((1,)))
    whole = score_locally(spec)
    for actors in (3, 4, 20):
        shared = _in_shards(spec, count=4 * actors, at_least=actors)
        assert shared.scores == pytest.approx(whole.scores, abs=1e-6)
        assert shared.removal_order == whole.removal_order


def test_shards_hold_every_cell_once(spec: ScoreSpec) -> None:
    scorer = Scorer(spec)
    for count, at_least in ((1, 1), (2, 2), (3, 3), (7, 7), (50, 12), (50, 14), (50, 1000)):
        shards = scorer.shards(count, at_least=at_least)
        cells = [(p, c) for shard in shards for p in shard.positions for c in shard.candidates]
        assert sorted(cells) == [(p, c) for p in range(7) for c in range(6)]
        assert len(shards) >= min(at_least, 7 * 6)


def test_shards_are_of_like_size(spec: ScoreSpec) -> None:
    for count, sizes in {1: [7], 2: [4, 3], 3: [3, 2, 2], 7: [1] * 7, 50: [1] * 7}.items():
        assert [len(shard.positions) for shard in Scorer(spec).shards(count)] == sizes


@pytest.mark.parametrize("criterion", ["hidden_cosine", "perplexity", "kl"])
def test_a_memory_budget_changes_no_score(spec: ScoreSpec, criterion: str) -> None:
    spec = replace(spec, criterion=criterion)
    budgeted = score_locally(replace(spec, memory_budget_gb=300_000 / GIB))
    assert budgeted.scores == pytest.approx(score_locally(spec).scores, rel=1e-6)


@pytest.mark.parametrize("criterion", ["hidden_cosine", "kl", "block_influence", "taylor"])
def test_a_streamed_model_has_the_same_scores(spec: ScoreSpec, adapter: ArtifactRef, criterion: str) -> None:
    """Unpruned, and pruned and recovered against the unpruned source; two shards, too."""
    spec = replace(spec, criterion=criterion)
    for model in (spec.model, spec.model.adapted(adapter).without(DROPPED)):
        loaded = replace(spec, model=model)
        streamed = replace(loaded, stream_weights=True)
        want = score_locally(loaded)
        assert score_locally(streamed).scores == pytest.approx(want.scores, abs=1e-6)
        assert _in_shards(streamed, 2).scores == pytest.approx(want.scores, abs=1e-6)


@pytest.mark.parametrize("option", [{"eliminate": True}, {"screen_dtype": "bfloat16"}])
def test_options_that_a_criterion_cannot_take_are_refused(spec: ScoreSpec, option: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{min(option)} does not go with criterion 'block_influence'"):
        Scorer(replace(spec, criterion="block_influence", **option))


@pytest.mark.parametrize("criterion", ["task_metric", "laco"])
def test_whole_models_cannot_be_streamed(spec: ScoreSpec, criterion: str) -> None:
    with pytest.raises(RequestError, match=f"stream_weights does not go with criterion '{criterion}'"):
        Scorer(replace(spec, criterion=criterion, stream_weights=True))


@pytest.fixture(scope="module")
def long_spec(tmp_path_factory: pytest.TempPathFactory, spec: ScoreSpec) -> ScoreSpec:
    """Many short sequences of random words."""
    words, draw = " ".join(LINES).split(), random.Random(0)
    lines = [" ".join(draw.choices(words, k=3)) for _ in range(128)]
    file = tmp_path_factory.mktemp("long") / "calibration.txt"
    file.write_text("\n".join(lines))
    return replace(spec, calibration=TextSpec(path=str(file)))


def test_giving_up_candidates_saves_work_and_not_the_winner(long_spec: ScoreSpec) -> None:
    whole, eliminated = score_locally(long_spec), score_locally(replace(long_spec, eliminate=True))
    assert eliminated.removal_order[0] == whole.removal_order[0]
    assert sorted(eliminated.removal_order) == sorted(whole.removal_order)
    assert whole.layer_forwards_saved == 0 < eliminated.layer_forwards_saved
    assert eliminated.layer_forwards + eliminated.layer_forwards_saved == whole.layer_forwards
    shared = _in_shards(replace(long_spec, eliminate=True), 4)
    assert shared.scores == pytest.approx(eliminated.scores, abs=1e-6)
    assert shared.layer_forwards_saved == eliminated.layer_forwards_saved


def test_screening_is_of_models_in_float32(spec: ScoreSpec) -> None:
    model = ModelRef(replace(spec.model.source, dtype="bfloat16"))
    with pytest.raises(RequestError, match=r"screens for scores in float32, and .* is in bfloat16"):
        Scorer(replace(spec, model=model, screen_dtype="bfloat16"))


@pytest.mark.parametrize("stream_weights", [False, True])
def test_screened_and_bounded_scores_are_of_the_right_layers(
    spec: ScoreSpec, adapter: ArtifactRef, stream_weights: bool
) -> None:
    spec = replace(spec, model=spec.model.adapted(adapter).without(DROPPED), stream_weights=stream_weights)
    want = score_locally(spec)
    got = score_locally(replace(spec, eliminate=True, screen_dtype="bfloat16"))
    assert got.removal_order[0] == want.removal_order[0]
    assert sorted(got.removal_order) == sorted(KEPT)
    exact = [i for i, kind in enumerate(got.kind_of_each) if kind == "exact"]
    assert [got.scores[i] for i in exact] == pytest.approx([want.scores[i] for i in exact], abs=1e-6)


def test_the_unpruned_model_is_read_once_for_all_iterations(
    spec: ScoreSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its contents are known, its states are found on the node."""
    source = replace(spec.model.source, contents=describe_model(spec.model.source).spec.contents)
    first = replace(spec, model=ModelRef(source))
    want = score_locally(replace(spec, model=spec.model.without(DROPPED)))
    score_locally(first)
    monkeypatch.setattr(score, "load_source", None)
    pruned = score_locally(replace(first, model=first.model.without(DROPPED)))
    assert pruned.scores == pytest.approx(want.scores, abs=1e-6)
    assert pruned.layer_forwards == want.layer_forwards - 7 * 6


@pytest.mark.parametrize("reference", ["source", "current"])
def test_a_pruned_and_recovered_model(spec: ScoreSpec, adapter: ArtifactRef, reference: str) -> None:
    model = spec.model.adapted(adapter).without(DROPPED)
    result = score_locally(replace(spec, model=model, reference=reference))

    source, _ = load_model(spec.model.source.path)
    current, _ = load_model(spec.model.source.path)
    with torch.no_grad():
        for layer in (2, 4):
            current.model.layers[layer].self_attn.o_proj.weight += torch.ones(32, 32)
    remove_layers(current, DROPPED)
    sequences = Scorer(spec).sequences
    want = score_layers(current, sequences, reference=source if reference == "source" else None)
    assert result.scores == pytest.approx(want, abs=1e-6)
    assert result.source_layers == KEPT
    assert result.removal_order == tuple(sorted(KEPT, key=lambda i: -want[KEPT.index(i)]))


def test_source_and_current_are_two_references(spec: ScoreSpec) -> None:
    pruned = replace(spec, model=spec.model.without(DROPPED))
    by_source = score_locally(pruned).scores
    assert by_source != pytest.approx(score_locally(replace(pruned, reference="current")).scores, abs=1e-3)


def test_limits_on_sequences(spec: ScoreSpec) -> None:
    result = score_locally(replace(spec, max_sequences=2, sequence_length=5))
    assert (result.num_sequences, result.num_tokens) == (2, 10)


def test_a_criterion_without_text_reads_none(spec: ScoreSpec) -> None:
    result = score_locally(replace(spec, criterion="deepest", model=spec.model.without(DROPPED)))
    assert result.removal_order == (4, 2, 0, 5)
    assert (result.num_sequences, result.num_tokens, result.layer_forwards) == (0, 0, 0)


def test_an_unknown_criterion_is_refused_before_a_model_is_loaded(spec: ScoreSpec) -> None:
    missing = ModelRef(ModelSpec("/no/such/model"))
    with pytest.raises(RequestError, match="unknown criterion"):
        Scorer(replace(spec, model=missing, criterion="hidden"))
