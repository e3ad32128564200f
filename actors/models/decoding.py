"""Decoding by what the caller says alone, whatever the model's generation_config.json says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: the model's generation configuration's and the tokenizer's."""
    known = model.generation_config.eos_token_id if model.generation_config else None
    listed = known if isinstance(known, list) else [known]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})


@contextmanager
def plain_greedy(model: PreTrainedModel, **settings: Any) -> Iterator[GenerationConfig]:
    """Give a configuration under which `generate` takes the likeliest token of the model's own logits.

    `generate` fills each field that a configuration leaves open (a penalty, a minimal length, tokens to
    suppress) from the model's own, so the model's is another one inside this context.

    Args:
        settings: further fields of `GenerationConfig`, such as `max_new_tokens` and `eos_token_id`.
    """
    greedy = GenerationConfig(do_sample=False, num_beams=1, use_cache=True, **settings)
    own, model.generation_config = model.generation_config, greedy
    try:
        yield greedy
    finally:
        model.generation_config = own
