"""Generation by vLLM, for large models: an optional engine, in an environment of its own."""

from importlib.util import find_spec

from actors.contracts import GenerationSpec, digest
from actors.errors import RequestError
from actors.generation.prompts import encode_prompts
from actors.generation.responses import Response, Shard
from actors.models import load_tokenizer
from actors.models.loading.source import snapshot

PACKAGES = ("vllm>=0.30,<1",)
"""What the environment of vLLM's actors is made of: it needs other releases of torch and transformers."""


def packages() -> tuple[str, ...]:
    """Return what an actor of this engine needs installed besides what is here; nothing if vLLM is here."""
    return () if find_spec("vllm") else PACKAGES


class VllmEngine:
    """The model in vLLM, on the GPUs of this process; it batches by itself.

    Raises:
        RequestError: vLLM is not installed.
    """

    def __init__(self, spec: GenerationSpec):
        try:
            from vllm import LLM
        except ImportError as error:
            raise RequestError(
                "recovery.generation.engine: vllm is not installed here (on a Ray cluster its actors get an "
                f"environment of their own); make one with {PACKAGES[0]!r}, or serve the model and set "
                "engine to openai, or to transformers"
            ) from error
        import torch

        self._spec = spec
        self._tokenizer = load_tokenizer(spec.model)
        self._model = LLM(
            model=str(snapshot(spec.model)),
            dtype=spec.model.dtype,
            trust_remote_code=spec.model.trust_remote_code,
            tensor_parallel_size=spec.tensor_parallel_size or max(1, torch.cuda.device_count()),
            max_model_len=spec.max_model_len,
        )
        self._context = self._model.llm_engine.model_config.max_model_len

    def respond(self, shard: Shard) -> list[Response]:
        from vllm import SamplingParams

        spec = self._spec
        ids, left_out = encode_prompts(shard.prompts, self._tokenizer, spec, shard.first, self._context)
        sampling = [
            SamplingParams(
                n=spec.responses_per_prompt,
                temperature=spec.temperature,
                top_p=spec.top_p,
                top_k=-1,
                min_p=0.0,
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                max_tokens=spec.max_new_tokens,
                seed=int(digest([spec.seed, shard.first + place])[:8], 16),
            )
            for place in ids
        ]
        prompts = [{"prompt_token_ids": each} for each in ids.values()]
        outputs = self._model.generate(prompts, sampling, use_tqdm=False)
        responses = [
            Response(
                shard.prompts[place],
                response.text.strip(),
                response.finish_reason == "stop",
                len(response.token_ids),
            )
            for place, output in zip(ids, outputs, strict=True)
            for response in output.outputs
        ]
        return responses + left_out
