"""The truth test of surgery over model types, and docs/families.md as its outcome."""

from itertools import combinations
from pathlib import Path

import pytest
from transformers import BartConfig

from actors.errors import RequestError
from actors.models import depth
from actors.models.pruning.surgery import blocks_alike, check_removal
from tests.support.decoder_zoo import NUM_LAYERS, decoder_types, tiny_decoder
from tests.support.surgery_truth import judge
from tests.support.tiny_models import VOCAB_SIZE

DOCS = Path(__file__).parents[3] / "docs/families.md"
REPRESENTATIVE = (
    "bloom", "deepseek_v3", "ernie4_5_moe", "falcon", "gemma3_text", "glm4_moe", "gpt2", "gpt_oss",
    "granitemoehybrid", "jamba", "lfm2", "mpt", "nemotron_h", "olmo3", "opt", "phi3", "qwen3_moe",
    "qwen3_next", "rwkv", "smollm3",
)  # fmt: skip

ALIKE = {
    "llama": True, "phi3": True, "gpt2": True, "opt": True,
    "gemma3_text": False, "jamba": False, "deepseek_v3": False, "smollm3": False, "diffllama": False,
}  # fmt: skip


def _rows() -> dict[str, str]:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_family_passes_or_is_refused_as_documented(model_type: str) -> None:
    assert str(judge(model_type)) == _rows()[model_type]


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_where_blocks_are_alike_any_of_them_can_go(model_type: str) -> None:
    model = tiny_decoder(model_type)
    if blocks_alike(model):
        for layers in (*combinations(range(NUM_LAYERS), 1), *combinations(range(NUM_LAYERS), 3)):
            assert check_removal(model, layers) == [i for i in range(NUM_LAYERS) if i not in layers]


def test_blocks_are_alike_in_plain_families_and_not_in_patterned_ones() -> None:
    alike = {model_type: blocks_alike(tiny_decoder(model_type)) for model_type in ALIKE}
    assert alike == ALIKE


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted(set(decoder_types()) - set(REPRESENTATIVE)))
def test_every_family_passes_or_is_refused_as_documented(model_type: str) -> None:
    assert str(judge(model_type)) == _rows()[model_type]


def test_every_decoder_of_the_installed_transformers_is_documented() -> None:
    assert set(decoder_types()) <= _rows().keys()


def test_most_families_pass() -> None:
    verdicts = [row.split("|")[2].strip() for row in _rows().values()]
    assert verdicts.count("passes") >= 95


def test_an_encoder_with_a_decoder_is_refused() -> None:
    with pytest.raises(RequestError, match="is_encoder_decoder"):
        depth(BartConfig(vocab_size=VOCAB_SIZE))
