"""The probes: abilities that a pruned model may lose, beyond its accuracy on tasks.

A new probe is one function and one row of `PROBES`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import EvaluationSpec, Metric, ModelRef, Progress, no_progress
from actors.errors import RequestError
from actors.evaluation.batch_size import BATCH_SIZE
from actors.evaluation.probes.arithmetic import answer_problems, draw_problems
from actors.evaluation.probes.code_tasks import score_code
from actors.evaluation.probes.decoding import encode_prompt, respond
from actors.evaluation.probes.degeneration import repetition, self_bleu
from actors.evaluation.probes.speculative import speculate
from actors.models import load_source, open_model, places
from actors.plugins import find_row

PROMPTS = Path(__file__).with_name("prompts")
NUM_PROBLEMS = 200
"""Arithmetic problems, as many as the paper's."""

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Ends of the continuation of a function (Chen et al. 2021, §2.2)."""

CODE_REQUEST = (
    "Complete this Python function. Answer with one fenced block of code.\n\n```python\n{prompt}```"
)


@dataclass(frozen=True)
class Probe:
    """A function (model, tokenizer, spec) → metrics, and where it comes from.

    It reads of the spec `limit` (how many problems or prompts), `max_new_tokens`,
    `batch_size`, `seed`, `allow_code_execution`, and where another model takes part `model`,
    `assistant` and `num_assistant_tokens`. `gives` are its metrics, to which
    the probe's name is prefixed, and what each is. With `reports`, it takes a `Progress` as its
    fourth argument.
    """

    run: Callable[..., list[Metric]]
    paper: str
    gives: Mapping[str, str]
    reports: bool = False


def check_probes(names: Sequence[str]) -> None:
    """Raise RequestError for a name that is no probe."""
    for name in names:
        find_probe(name)


def find_probe(name: str) -> Probe:
    """Return the probe of that name, ours or a plug-in's."""
    return find_row("probe", name, PROBES, Probe)


def run_probe(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress = no_progress,
) -> list[Metric]:
    """Return metrics `name/measure` of one probe, measured on a model that is in memory."""
    probe = find_probe(name)
    measured = probe.run(model, tokenizer, spec, *([progress] if probe.reports else []))
    return [Metric(f"{name}/{metric.name}", metric.value, metric.unit, metric.stderr) for metric in measured]


def probe_prompts(name: str, tokenizer: PreTrainedTokenizerBase, spec: EvaluationSpec) -> list[list[int]]:
    """Return the tokens of a built-in probe's prompts; none if it does not generate."""
    texts = {
        "degeneration": lambda: _instructions(spec),
        "code_failures": lambda: _code_prompts(tokenizer, spec),
        "speculative": lambda: _instructions(spec),
    }
    return [encode_prompt(tokenizer, text) for text in texts[name]()] if name in texts else []


def _instructions(spec: EvaluationSpec) -> list[str]:
    return (PROMPTS / "instructions.txt").read_text(encoding="utf-8").splitlines()[: spec.limit]


def _code_prompts(tokenizer: PreTrainedTokenizerBase, spec: EvaluationSpec) -> list[str]:
    problems = _code_problems()[: spec.limit]
    chat = bool(tokenizer.chat_template)
    return [CODE_REQUEST.format_map(problem) if chat else problem["prompt"] for problem in problems]


def degeneration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress = no_progress,
) -> list[Metric]:
    """Measure repetition within the responses to instructions, and among them."""
    prompts = _instructions(spec)
    responses = respond(
        model, tokenizer, prompts, spec.max_new_tokens, spec.batch_size or BATCH_SIZE, progress
    )
    texts = [response.tokens for response in responses]
    return [
        _mean("repetition_4", [repetition(text) for text in texts]),
        Metric("self_bleu_4", self_bleu(texts)),
        _mean("mean_tokens", [len(text) for text in texts], "tokens"),
    ]


def speculative(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress = no_progress,
) -> list[Metric]:
    """Measure `model` as the draft of the unpruned one, or `spec.assistant` as the draft of `model`.

    Nothing is measured of an unpruned model without an assistant.

    Raises RequestError for an assistant that reads other tokens.
    """
    verifier, draft = model, model
    if spec.assistant is not None:
        draft, other = open_model(spec.assistant, places())
        if other.get_vocab() != tokenizer.get_vocab():
            raise RequestError(
                f"the tokenizer of assistant {spec.assistant.path!r} is not that of "
                f"{spec.model.source.path!r}: a draft must write the same tokens"
            )
    elif spec.model == ModelRef(spec.model.source):
        return []
    else:
        verifier = load_source(spec.model, places())[0]
    prompts = _instructions(spec)
    answers = speculate(
        verifier, draft, tokenizer, prompts, spec.max_new_tokens, spec.num_assistant_tokens, progress
    )
    tokens, seconds = (sum(getattr(each, name) for each in answers) for name in ("tokens", "seconds"))
    drafted, accepted = (sum(getattr(each, name) for each in answers) for name in ("drafted", "accepted"))
    plain_rate = sum(each.plain_tokens for each in answers) / sum(each.plain_seconds for each in answers)
    return [
        Metric("acceptance_rate", accepted / drafted if drafted else 0.0),
        Metric("tokens_per_forward", tokens / sum(each.forwards for each in answers)),
        Metric("tokens_per_second", tokens / seconds, "tokens/s"),
        Metric("speedup", tokens / seconds / plain_rate),
        Metric("same_text", sum(each.same_text for each in answers) / len(answers)),
    ]


def arithmetic(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress = no_progress,
) -> list[Metric]:
    """Measure one-digit sums; the change is taken against the unpruned model's row."""
    problems = draw_problems(spec.limit or NUM_PROBLEMS, spec.seed)
    predictions = answer_problems(model, tokenizer, problems, spec.batch_size or BATCH_SIZE, progress)
    return [
        _mean("log_probability", [found.log_probability for found in predictions], "nats"),
        _mean(
            "log_probability_vocabulary", [found.log_probability_vocabulary for found in predictions], "nats"
        ),
        _mean("top1", [float(found.right) for found in predictions]),
    ]


def code_failures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress = no_progress,
) -> list[Metric]:
    """Classify the failures of the code that a model writes for small problems.

    Models with a chat template get the request to complete a function, others continue
    its signature and docstring.
    """
    problems = _code_problems()[: spec.limit]
    chat = bool(tokenizer.chat_template)
    prompts = _code_prompts(tokenizer, spec)
    responses = respond(
        model, tokenizer, prompts, spec.max_new_tokens, spec.batch_size or BATCH_SIZE, progress
    )
    texts = [response.text for response in responses]
    if not chat:
        ends = [[at for stop in STOPS if (at := text.find(stop)) >= 0] for text in texts]
        texts = [text[: min(found, default=None)] for text, found in zip(texts, ends, strict=True)]
    # A text that continues after its function has ended was not cut within it.
    finished = [
        response.finished or text != response.text for response, text in zip(responses, texts, strict=True)
    ]
    unfinished = sum(not response.finished for response in responses) / len(responses)
    scores = score_code(problems, texts, spec.allow_code_execution, finished)
    return [*scores, Metric("unfinished", unfinished)]


def _code_problems() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROMPTS / "code.jsonl").read_text(encoding="utf-8").splitlines()]


def _mean(name: str, values: Sequence[float], unit: str = "") -> Metric:
    """Return the mean over items, with its standard error where there are two."""
    count = len(values)
    mean = sum(values) / count
    spread = sum((value - mean) ** 2 for value in values)
    return Metric(name, mean, unit, math.sqrt(spread / (count - 1) / count) if count > 1 else None)


LIMITS = "On the Limits of Layer Pruning for Generative Reasoning in Large Language Models"

PROBES: Mapping[str, Probe] = {
    "degeneration": Probe(
        degeneration,
        f"{LIMITS}, §3.1 and App. A.2",
        {
            "repetition_4": "share of the 4-grams of a text that stood in it before, mean over texts",
            "self_bleu_4": "BLEU-4 of a text with all others as references, mean over texts",
            "mean_tokens": "tokens of a text, mean over texts",
        },
        reports=True,
    ),
    "arithmetic": Probe(
        arithmetic,
        f"{LIMITS}, §3.2 and App. A.4",
        {
            "log_probability": "of the right digit among the ten digits, mean over problems",
            "log_probability_vocabulary": "the same among all tokens",
            "top1": "share of problems whose right digit is the likeliest of the ten",
        },
        reports=True,
    ),
    "code_failures": Probe(
        code_failures,
        f"{LIMITS}, §3.3",
        {
            "malformed_fences": "share of responses whose Markdown code fences do not match",
            "unbalanced_parentheses": "… that do not parse, with brackets that do not match",
            "undefined_names": "… that parse, and read a name that nothing binds",
            "other_syntax": "… that do not parse for another reason",
            "clean": "… with none of these",
            "cut_off": "… whose code max_new_tokens cut, and which are not judged; the six add up to 1",
            "pass_at_1": "share that passes its tests; only with allow_code_execution",
            "unfinished": "share of responses that were cut at max_new_tokens",
        },
        reports=True,
    ),
    "speculative": Probe(
        speculative,
        "Leviathan et al. 2023 (arXiv 2211.17192), by transformers' assisted generation",
        {
            "acceptance_rate": "share of the drafted tokens that the unpruned model takes",
            "tokens_per_forward": "new tokens for each forward pass of the unpruned model",
            "tokens_per_second": "new tokens over the time that they took, drafting included",
            "speedup": "that, over plain greedy decoding by the unpruned model",
            "same_text": "share of prompts on which plain greedy decoding gives the same tokens",
        },
        reports=True,
    ),
}
