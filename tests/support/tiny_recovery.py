"""A tiny recovery request that trains in about a second."""

from pathlib import Path

from actors.contracts import AdapterSpec, LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from tests.support.tiny_models import save_tiny

_TEXT = "The quick brown fox jumps over the lazy dog . Stability of the higher layer is greater . "


def tiny_recovery_spec(directory: Path) -> RecoverySpec:
    """Six steps of 4 x 16 tokens on a 4-layer Llama without block 2, with dropout.

    Model and text are written to `directory`.
    """
    path = save_tiny(directory / "model", num_layers=4)
    (directory / "text.txt").write_text("\n".join(f"{i} {_TEXT}" for i in range(40)))
    return RecoverySpec(
        model=ModelRef(ModelSpec(path), dropped=(2,)),
        data=TextSpec(path=str(directory / "text.txt")),
        loss=LossSpec(hidden=1.0, attention=1.0, logits=1.0),
        adapter=AdapterSpec(rank=4, dropout=0.1),
        sequence_length=16,
        batch_size=4,
        micro_batch_size=1,
        learning_rate=1e-2,
        lr_schedule="cosine",
        warmup_steps=2,
        max_tokens=6 * 64 + 10,
        checkpoint_steps=2,
        seed=3,
    )
