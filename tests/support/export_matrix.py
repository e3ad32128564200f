"""Tiny models of many families, made and opened by whatever transformers this process imports.

`python -m tests.support.export_matrix make DIR` saves one of each family under DIR; `... logits DIR OUT`
writes the logits and the tokens of a sentence that each directory under DIR gives, `... perplexity MODEL
OUT` the perplexity of the built-in test text. Run with transformers 4 before the installed one on
PYTHONPATH, they tell what that version writes and reads.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_models import MAX_POSITIONS, VOCAB_SIZE, tiny_ids, tiny_tokenizer

SENTENCE = "Stability of the higher layer leads to greater stability ."

_WINDOW = {"sliding_window": 5}
_HEADS = {"head_dim": 8}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {f"linear_{name}_head_dim": 8 for name in ("key", "value")} | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"rope_theta": 1000000.0} | _WINDOW,
    "qwen2": {"rope_theta": 1000000.0, "use_sliding_window": True, "max_window_layers": 3} | _WINDOW,
    "qwen3": {"rope_theta": 1000000.0} | _HEADS,
    "gemma2": {"query_pre_attn_scalar": 8} | _WINDOW | _HEADS,
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "sliding_window_pattern": 3,
        "rope_theta": 70000.0,
        "rope_local_base_freq": 500.0,
    }
    | _WINDOW
    | _HEADS,
    "phi3": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    },
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_inner": 64, "n_positions": MAX_POSITIONS},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 700.0},
    "stablelm": {"partial_rotary_factor": 0.5, "rope_theta": 700.0},
    "olmo2": {"rope_theta": 500000.0},
    "granite": {"rope_theta": 700.0, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layer_interval": 3, "rope_theta": 700.0},
    "cohere2": {"sliding_window_pattern": 3, "rope_theta": 700.0} | _WINDOW,
    "exaone4": {"sliding_window_pattern": 3, "rope_theta": 700.0} | _WINDOW,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 700.0} | _WINDOW | _HEADS,
    "llama4_text": {
        "no_rope_layer_interval": 3,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 5,
        "num_local_experts": 4,
        "intermediate_size_mlp": 64,
        "rope_theta": 700.0,
    }
    | _HEADS,
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [1, 4]} | _EXPERTS | _HEADS,
    "qwen3_next": {"num_experts": 4, "full_attention_interval": 3, "mlp_only_layers": [2]}
    | {"shared_expert_intermediate_size": 32}
    | _EXPERTS
    | _HEADS
    | _LINEAR,
    "deepseek_v3": {"first_k_dense_replace": 2, "num_nextn_predict_layers": 1, "num_key_value_heads": 4}
    | _MLA
    | _GROUPED
    | _EXPERTS,
    "glm4_moe": {"first_k_dense_replace": 2, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5}
    | _GROUPED
    | _EXPERTS
    | _HEADS,
}
"""Config fields of each family beyond the common sizes, as transformers 4 names them."""


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(directory: Path) -> None:
    """Save a random model and its tokenizer for every family."""
    for family in FAMILIES:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))
        model = AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            # Drawn wide, so that a layer that works otherwise changes the output by more than rounding.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory / family)
        tiny_tokenizer().save_pretrained(directory / family)


@torch.no_grad()
def logits(directory: Path, output: Path) -> None:
    """Write the logits [B, T, V] and the tokens of `SENTENCE` of every model under `directory`."""
    found = {}
    for model_directory in sorted(directory.iterdir()):
        # Versions differ in which attention caps its scores (Gemma 2); eager does in all.
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_directory, attn_implementation="eager", output_loading_info=True
        )
        assert not loading["missing_keys"], (model_directory, loading["missing_keys"])
        tokens = AutoTokenizer.from_pretrained(model_directory)(SENTENCE).input_ids
        found[model_directory.name] = (model.eval()(tiny_ids(), use_cache=False).logits.float(), tokens)
    torch.save(found, output)


@torch.no_grad()
def perplexity(directory: Path, output: Path, windows: int = 12, context: int = 256) -> None:
    """Write the perplexity over `windows` windows of `context` tokens."""
    text = Path("actors/data/builtin/wikitext-2-raw-test.txt").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(directory)(text[:30000]).input_ids)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = ids[: windows * context].view(windows, 1, context)
    losses = [float(model(input_ids=row, labels=row).loss) for row in rows]
    output.write_text(str(math.exp(sum(losses) / windows)))


if __name__ == "__main__":
    {"make": make, "logits": logits, "perplexity": perplexity}[sys.argv[1]](*map(Path, sys.argv[2:]))
