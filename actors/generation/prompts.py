"""Prompts as token ids, for every engine: which of them can be answered."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from actors.contracts import GenerationSpec
from actors.data import chat_template, render, tokenizer_errors
from actors.errors import RequestError
from actors.generation.responses import Prompt, Response

NO_CONTEXT_LIMIT = 2**31


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    spec: GenerationSpec,
    first: int,
    context: int | None,
) -> tuple[dict[int, list[int]], list[Response]]:
    """Return the token ids of each prompt that can be answered, by its place, and the others as responses.

    A prompt is left out if the template cannot write it, or if it leaves no room for `max_new_tokens` in the
    model's `context`, which `spec.max_model_len` may make shorter.

    Args:
        first: the number of the first prompt.

    Raises:
        RequestError: no chat template.
    """
    template = chat_template(tokenizer, spec.prompts)
    longest = min(context or NO_CONTEXT_LIMIT, spec.max_model_len or NO_CONTEXT_LIMIT) - spec.max_new_tokens
    ids: dict[int, list[int]] = {}
    left_out = []
    for place, prompt in enumerate(prompts):
        label = f"prompt {first + place} of {spec.prompts.name!r}, blank ones not counted"
        try:
            with tokenizer_errors(label, tokenizer):
                text = render(list(prompt), tokenizer, template, add_generation_prompt=True)
                encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except RequestError as error:
            left_out.append(Response(prompt, left_out=str(error)))
            continue
        if len(encoded) > longest:
            left_out.append(Response(prompt, left_out=f"longer than {longest} tokens", too_long=True))
            continue
        ids[place] = encoded
    return ids, left_out
