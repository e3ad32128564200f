"""Generation by a server that speaks OpenAI's completions API: vLLM, SGLang, llama.cpp and others."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from actors.contracts import GenerationSpec, digest
from actors.errors import RequestError, WorkError
from actors.generation.prompts import encode_prompts
from actors.generation.responses import Response, Shard
from actors.models import load_tokenizer, text_config
from actors.models.loading.load import load_config

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT_S = 3600.0
"""Longest wait for a response: a busy server lets requests wait."""
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What servers would else take from the model's own generation configuration."""


class EndpointEngine:
    """The model at `spec.base_url`, asked with token ids, so that it reads what the other engines read.

    `spec.batch_size` requests are under way at a time. The key for the server, if it wants one, is in the
    environment variable OPENAI_API_KEY.

    Raises:
        RequestError: the server is out of reach, or does not serve the model.
    """

    def __init__(self, spec: GenerationSpec):
        self._spec = spec
        self._url = str(spec.base_url).rstrip("/")
        self._model = spec.served_model or spec.model.path
        self._tokenizer = load_tokenizer(spec.model)
        config = text_config(load_config(spec.model))
        self._context = getattr(config, "max_position_embeddings", None)
        served = [str(each.get("id")) for each in self._call("/models")["data"]]
        if self._model not in served:
            raise RequestError(
                f"recovery.generation.base_url {self._url} does not serve {self._model!r}, but: "
                f"{', '.join(served)}; set recovery.generation.served_model to the name of the unpruned model"
            )

    def respond(self, shard: Shard) -> list[Response]:
        ids, left_out = encode_prompts(shard.prompts, self._tokenizer, self._spec, shard.first, self._context)
        with ThreadPoolExecutor(self._spec.batch_size) as threads:
            answered = threads.map(lambda place: self._complete(shard, place, ids[place]), ids)
            return [response for responses in answered for response in responses] + left_out

    def _complete(self, shard: Shard, place: int, ids: list[int]) -> list[Response]:
        spec = self._spec
        seed = int(digest([spec.seed, shard.first + place])[:8], 16) % 2**31
        request: dict[str, Any] = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": spec.max_new_tokens,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            **NEUTRAL,
        }
        # Some servers give one response whatever `n` says: the others are asked for again.
        responses: list[Response] = []
        while len(responses) < spec.responses_per_prompt:
            missing = spec.responses_per_prompt - len(responses)
            request |= {"n": missing, "seed": seed + len(responses)}
            choices = self._call("/completions", request)["choices"][:missing]
            if not choices:
                raise WorkError(f"{self._url}/completions gave no response to prompt {shard.first + place}")
            for choice in choices:
                text = str(choice["text"]).strip()
                tokens = len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                finished = choice.get("finish_reason") == "stop"
                responses.append(Response(shard.prompts[place], text, finished, tokens + finished))
        return responses

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self._url + path, data, headers), timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise RequestError(f"{self._url}{path} refused the request ({error.code}): {said}") from error
        except (URLError, HTTPException, OSError, ValueError) as error:
            raise WorkError(
                f"recovery.generation.base_url {self._url} gave no answer ({error}); is the server of the "
                f"unpruned model running at {urlsplit(self._url).netloc}? --resume goes on"
            ) from error
