"""One model over several devices that are too small for it: what each holds, and whether numbers change.

    python -m benchmarks.placement [--blocks 20] [--width 2048] [--devices 4] [--device-gb 2]

A random Llama-shaped model in float32 is scored and evaluated in one piece, then placed over devices that are
made up: their tensors are computed on the CPU, an operation over tensors of two devices fails, and the bytes
of every tensor count for its device.
"""

import argparse
from collections import Counter
from time import perf_counter

import torch
from accelerate import dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from actors.evaluation.lm_eval.loglikelihood import LikelihoodModel, Scored
from actors.models.offloading.placement import Place, device_map
from actors.scoring import score_layers
from tests.support.made_up_devices import made_up, made_up_devices

GB = 10**9


def measure(model: PreTrainedModel, ids_ST: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return the scores of the layers, and the log-likelihoods of the second half of each sequence."""
    scores = score_layers(model, list(ids_ST), memory_budget=GB // 4)
    half = ids_ST.shape[1] // 2
    requests = [Scored(ids_T.tolist(), ids_T[half:].tolist()) for ids_T in ids_ST]
    found = LikelihoodModel(model, batch_tokens=256).loglikelihoods(requests)
    return scores, [log_likelihood for log_likelihood, _ in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--device-gb", type=float, default=2.0, help="of each device, 10^9 bytes")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32_000,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    ids_ST = torch.randint(0, config.vocab_size, (options.sequences, options.tokens))
    began = perf_counter()
    whole = measure(model, ids_ST)
    print(f"{size / GB:.2f} GB in one piece: {perf_counter() - began:.0f} s", flush=True)
    over = [Place(made_up(index), int(options.device_gb * GB)) for index in range(options.devices)]
    with made_up_devices() as held:
        dispatch_model(model, device_map(model, over), main_device=over[0].device)
        weights = Counter(held.now)
        held.peak.clear()
        began = perf_counter()
        placed = measure(model, ids_ST.to(over[0].device))
        print(f"over {len(over)} devices of {options.device_gb:g} GB: {perf_counter() - began:.0f} s")
        print("| device | weights, GB | peak, GB |\n|--:|--:|--:|")
        for place in over:
            index = place.device.index
            print(f"| {index} | {weights[index] / GB:.3f} | {held.peak[index] / GB:.3f} |")
            assert held.peak[index] <= place.num_bytes
    for name, one, several in zip(("scores", "log-likelihoods"), whole, placed, strict=True):
        apart = max(abs(a - b) / max(1e-12, abs(a)) for a, b in zip(one, several, strict=True))
        print(f"largest relative difference of {name}: {apart:.1e}")


if __name__ == "__main__":
    main()
