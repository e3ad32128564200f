"""Our lm-eval model against lm-eval's own HFLM, request by request, in families that differ."""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from actors.errors import WorkError
from actors.evaluation.lm_eval import loglikelihood, prefix_tree
from actors.evaluation.lm_eval.family_support import family_support
from actors.evaluation.lm_eval.language_models import PrefixTreeLM
from actors.evaluation.lm_eval.loglikelihood import LikelihoodModel, Scored
from actors.evaluation.lm_eval.prefix_tree import build_trees
from tests.support.decoder_zoo import tiny_decoder_config
from tests.support.tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

MAX_LENGTH = 64
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "qwen2": {},
    "bloom": {},  # ALiBi, made from a flat mask: no trees
    "gemma2": {"final_logit_softcapping": 1.5, "sliding_window": 64},
    "gemma3_text": {},  # a window of 5 tokens: no trees
    "mixtral": {},
    "mamba": {},  # recurrent: no trees
}
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "ancient",
    "deities",
    "sleep",
]


def family_model(family: str) -> PreTrainedModel:
    if family != "mamba":
        return tiny_model(family, **FAMILIES[family])
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    return MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.2)).eval()


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def pairs(seed: int) -> list[tuple[str, str]]:
    """Questions with choices, one-token choices, minimal pairs, contexts too long, spaces, repetitions."""
    rng = random.Random(seed)
    found: list[tuple[str, str]] = []
    for _ in range(6):
        question = words(rng, 12)
        found += [(question, " " + words(rng, 5)) for _ in range(4)]
        found += [(question + "\nAnswer:", f" {letter}") for letter in "abcd"]
        sentence = words(rng, 8)
        found += [("", sentence + " " + words(rng, 3)) for _ in range(2)]
        found += [(question + " ", "dog"), (words(rng, 60), " " + words(rng, 6)), (question, "s")]
    found += [("", "<s>" + words(rng, 4)), ("<s>fox", " dog"), *found[:3], ("a\n\n  ", "fox \n")]
    rng.shuffle(found)
    return found


def instances(arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, args, i) for i, args in enumerate(arguments)]


def stock_and_ours(model: PreTrainedModel, **settings: object) -> tuple[HFLM, PrefixTreeLM]:
    stock = HFLM(
        pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4, max_length=MAX_LENGTH, **settings
    )
    return stock, PrefixTreeLM(model, tiny_tokenizer(), 4, MAX_LENGTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_hflm(family: str) -> None:
    stock, ours = stock_and_ours(family_model(family), logits_cache=False)
    requests = instances(pairs(0))
    expected, found = stock.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


@pytest.mark.parametrize(
    ("family", "most_nodes"),
    [("qwen2", None), ("mixtral", None), ("gemma2", 64), ("gemma3_text", 0), ("bloom", 0), ("mamba", 0)],
)
def test_trees_are_bounded_by_windows_and_nothing_else(family: str, most_nodes: int | None) -> None:
    assert LikelihoodModel(family_model(family)).most_nodes == most_nodes


@pytest.mark.parametrize("family", FAMILIES)
def test_rolling_numbers_are_those_of_hflm(family: str) -> None:
    rng = random.Random(1)
    stock, ours = stock_and_ours(family_model(family))
    texts = [words(rng, most) for most in (1, 20, 60, 60, 90)]
    requests = instances([(text,) for text in [*texts, texts[2], "<s>" + texts[0]]])
    expected = stock.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-6)


def test_greedy_continuations_are_noticed() -> None:
    model, tokenizer = family_model("llama"), tiny_tokenizer()
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    likeliest = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
    first = ids[0].tolist()
    asked = [Scored(first + likeliest[:-1], likeliest), Scored(first + likeliest[:-1], [*likeliest[:-1], 7])]
    assert [greedy for _, greedy in LikelihoodModel(model).loglikelihoods(asked)] == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ends_with_the_logits(dtype: torch.dtype) -> None:
    """What is made of the model's own logits is exact: here in float64, token by token."""
    model, requests = family_model("llama").to(dtype), _token_requests(30)
    likelihoods = LikelihoodModel(model, batch_tokens=1)
    likelihoods.most_nodes = 0
    for request, (found, _) in zip(requests, likelihoods.loglikelihoods(requests), strict=True):
        logits_TV = model(torch.tensor([request.tokens])).logits[0, -len(request.targets) :].double()
        expected = 0.0
        for logits_V, target in zip(logits_TV, request.targets, strict=True):
            expected += (logits_V[target] - logits_V.exp().sum().log()).item()
        assert found == pytest.approx(expected, rel=1e-6)


def test_half_precision_numbers_are_those_of_hflm_with_a_float32_softmax() -> None:
    """The blocks' own rounding depends on the batch in both."""
    stock, ours = stock_and_ours(family_model("llama").to(torch.bfloat16), softmax_dtype="float32")
    requests = instances(pairs(0))
    expected, found = stock.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests)
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], rel=0.02, abs=0.2)
    assert not all(v == torch.tensor(v).bfloat16().item() for v, _ in found)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid", "lfm2", "jamba"])
def test_a_hybrid_is_refused_in_any_type(family: str, dtype: torch.dtype) -> None:
    """Layers that carry a state along a row mix the branches of a tree, here by less than rounding shows."""
    config = tiny_decoder_config(family)
    config.initializer_range = 0.02
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    likelihoods, requests = LikelihoodModel(model, batch_tokens=1), _token_requests(8)
    assert likelihoods.most_nodes == 0
    for request, (found, _) in zip(requests, likelihoods.loglikelihoods(requests), strict=True):
        logits_TV = model(torch.tensor([request.tokens]), use_cache=False).logits[0]
        logprobs_TV = logits_TV[-len(request.targets) :].double().log_softmax(-1)
        expected = sum(logprobs_TV[i, target].item() for i, target in enumerate(request.targets))
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_a_family_is_known_by_its_config_alone(family: str) -> None:
    """Neither weights nor their type count; a model whose weights are gone is no different."""
    model = family_model(family)
    supported = family_support(model)
    assert supported.most_nodes != 0
    assert supported.head_stands_alone
    for dtype in (torch.bfloat16, torch.float16):
        assert family_support(family_model(family).to(dtype)) == supported
    assert family_support(model.to("meta")) == supported


def test_nothing_shared_is_computed_twice() -> None:
    """Through the blocks go the nodes of the trees, through the head the distinct scored positions."""
    model = family_model("llama")
    likelihoods = LikelihoodModel(model)
    question, choices = [5] * 20, [[9, 9, 9], [9, 9, 8], [7], [6]]
    requests = [Scored([*question, *choice[:-1]], choice) for choice in choices]
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    likelihoods.loglikelihoods(requests)
    assert seen == [22, 3]


def test_results_do_not_depend_on_how_much_fits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("gemma2")
    requests = _token_requests(30)
    expected = [value for value, _ in LikelihoodModel(model).loglikelihoods(requests)]
    for tokens in (1, 64, 10_000):
        found = LikelihoodModel(model, tokens).loglikelihoods(requests)
        assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(loglikelihood, "LOGITS_AT_A_TIME", 3 * VOCAB_SIZE)
    found = LikelihoodModel(model).loglikelihoods(requests)
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)


def test_batches_are_halved_when_memory_runs_out() -> None:
    model = family_model("llama")
    requests = _token_requests(40)
    expected = [value for value, _ in LikelihoodModel(model).loglikelihoods(requests)]
    likelihoods = LikelihoodModel(model)
    likelihoods.most_nodes = 0

    def small_memory(_module: object, args: tuple[torch.Tensor]) -> None:
        if args[0].shape[:2].numel() > 100:
            raise torch.OutOfMemoryError("no memory")

    handle = model.model.layers[0].register_forward_pre_hook(small_memory)
    found = [value for value, _ in likelihoods.loglikelihoods(requests)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert 25 <= likelihoods.batch_tokens <= 200
    handle.remove()
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    )
    with pytest.raises(WorkError, match=r"no memory for one row of \d+ tokens"):
        likelihoods.loglikelihoods(requests)


def _token_requests(count: int) -> list[Scored]:
    rng = random.Random(count)
    trunks = [rng.choices(range(3, 250), k=12) for _ in range(4)]
    requests = []
    for _ in range(count):
        ids = [*rng.choice(trunks)[: rng.randint(1, 12)], *rng.choices(range(3, 250), k=rng.randint(1, 20))]
        scored = rng.randint(1, len(ids) - 1)
        requests.append(Scored(ids[:-1], ids[-scored:]))
    return requests


def test_trees_hold_every_sequence_and_see_its_tokens_alone() -> None:
    rng = random.Random(3)
    sequences = [rng.choices((1, 2, 3), k=rng.randint(1, 7)) for _ in range(60)]
    trees = build_trees(sequences, None)
    assert sorted(member for tree in trees for member in tree.members) == list(range(60))
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert sum(len(tree) for tree in trees) == len(prefixes)
    for tree in trees:
        sees = tree.sees()
        for member, path in zip(tree.members, tree.paths, strict=True):
            assert [tree.tokens[node] for node in path] == sequences[member]
            assert [tree.depths[node] for node in path] == list(range(len(path)))
            for depth, node in enumerate(path):
                assert sees[node].nonzero()[:, 0].tolist() == path[: depth + 1]


def test_rows_stay_short_unless_sharing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "ROW", 16)
    apart = [[i, *[0] * 9] for i in range(4)]
    assert [len(tree) for tree in build_trees(apart, None)] == [10, 10, 10, 10]
    alike = [[*[5] * 20, i, i, i] for i in range(20)]
    assert [len(tree) for tree in build_trees(alike, None)] == [44, 44, 32]
    assert all(len(tree) <= 23 for tree in build_trees(alike, 23))
    assert [tree.members for tree in build_trees([[1, 2], [1, 2], [1]], 0)] == [[2], [0, 1]]
