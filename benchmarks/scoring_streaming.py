"""A model larger than memory, scored in one read of its files: peak memory and bytes read.

    python benchmarks/scoring_streaming.py DIRECTORY [--layers 16] [--sequences 4] [--tokens 16]

DIRECTORY receives a random Llama-shaped bfloat16 model (about 7 GB by default), if it holds none yet.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.contracts import ModelRef, ModelSpec
from actors.models import device, load_streamed
from actors.scoring import score_layers
from actors.scoring.criteria import removal_order

GB = 1e9


def make_model(directory: Path, num_layers: int) -> None:
    """Write a random model of D=4096, one file for each layer."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else "outside"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = weight
    directory.mkdir(parents=True, exist_ok=True)
    for file, weights in files.items():
        drawn = {
            n: torch.empty(w.shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03) for n, w in weights.items()
        }
        save_file(drawn, directory / file, metadata={"format": "pt"})
    index = {name: file for file, weights in files.items() for name in weights}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(directory)


def peak_rss() -> float:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bytes_read() -> int:
    """What this process has read from files so far, cached by the system or not."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def main() -> None:
    """Make the model if need be, score it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    if not (options.directory / "config.json").exists():
        maker = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(options.directory, options.layers)
        )
        maker.start()
        maker.join()
    size = sum(file.stat().st_size for file in options.directory.glob("*.safetensors"))
    generator = torch.Generator().manual_seed(0)
    sequences = list(torch.randint(3, 32000, (options.sequences, options.tokens), generator=generator))

    own, read_before, started = peak_rss(), bytes_read(), time.perf_counter()
    model = load_streamed(ModelRef(ModelSpec(str(options.directory), "bfloat16")), device())
    scores = score_layers(model, [ids.to(model.device) for ids in sequences])
    seconds, read = time.perf_counter() - started, bytes_read() - read_before
    print(
        f"model {size / GB:.2f} GB on disk, {options.sequences}x{options.tokens} tokens, {seconds:.0f} s\n"
        f"read {read / GB:.2f} GB: {read / size:.3f} x its size\n"
        f"peak RSS {peak_rss() / GB:.2f} GB, {own / GB:.2f} before: {(peak_rss() - own) / GB:.2f} GB more\n"
        f"layer {removal_order(scores, highest_first=True)[0]} goes first of {len(scores)}"
    )


if __name__ == "__main__":
    main()
