"""Generation by vLLM, for large models: an optional engine (`pip install iterabre[vllm]`)."""

from actors.contracts import GenerationSpec, digest
from actors.data import chat_template
from actors.errors import RequestError
from actors.generation.responses import Response, Shard
from actors.models.loading.source import snapshot


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
                "recovery.generation.engine: vllm is not installed; install the extra, "
                "pip install 'iterabre[vllm]', on every node, or use the engine transformers"
            ) from error
        self._spec = spec
        directory, remote_code = str(snapshot(spec.model)), spec.model.trust_remote_code
        self._model = LLM(model=directory, dtype=spec.model.dtype, trust_remote_code=remote_code)
        self._template = chat_template(self._model.get_tokenizer(), spec.prompts)

    def respond(self, shard: Shard) -> list[Response]:
        from vllm import SamplingParams

        spec = self._spec
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
                seed=int(digest([spec.seed, shard.first + i])[:8], 16),
            )
            for i in range(len(shard.prompts))
        ]
        messages = [list(prompt) for prompt in shard.prompts]
        outputs = self._model.chat(messages, sampling, chat_template=self._template, use_tqdm=False)
        return [
            Response(prompt, response.text.strip(), response.finish_reason == "stop", len(response.token_ids))
            for prompt, output in zip(shard.prompts, outputs, strict=True)
            for response in output.outputs
        ]
