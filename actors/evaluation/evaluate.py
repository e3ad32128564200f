"""Everything an `EvaluationSpec` asks for, measured on a model that is in memory."""

from importlib.metadata import version

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import EvaluationResult, EvaluationSpec, Metric, PerplexitySpec, Progress, no_progress
from actors.data import load_texts, tokenize_text
from actors.evaluation.harness import check_tasks, evaluate_tasks
from actors.evaluation.perplexity import token_perplexity


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress = no_progress,
) -> EvaluationResult:
    """Measure `model` on the spec's perplexity texts, then on its lm-eval tasks.

    `spec.model` is not looked at: the caller has loaded it. The tasks run
    together, as one call of the harness. Progress counts texts and, as one
    unit, the tasks.

    Raises RequestError for a wrong task or text before the model has run,
    WorkError if the data of a task cannot be read.
    """
    check_tasks(spec.tasks, spec.include_path)
    texts = {text.name: load_texts(text.data) for text in spec.perplexity}
    total = len(spec.perplexity) + bool(spec.tasks)
    metrics: list[Metric] = []
    versions = [(name, version(name)) for name in ("torch", "transformers")]
    for done, text in enumerate(spec.perplexity):
        progress(done, total, text.name)
        metrics += _perplexity(model, tokenizer, text, texts[text.name], spec.batch_size)
    if spec.tasks:
        progress(len(spec.perplexity), total, ", ".join(spec.tasks))
        task_metrics, task_versions = evaluate_tasks(
            model,
            tokenizer,
            spec.tasks,
            include_path=spec.include_path,
            limit=spec.limit,
            num_fewshot=spec.num_fewshot,
            batch_size=spec.batch_size,
            seed=spec.seed,
        )
        metrics += task_metrics
        versions += task_versions
    progress(total, total, "evaluated")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return EvaluationResult(tuple(metrics), num_parameters, tuple(versions))


def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: PerplexitySpec,
    texts: list[str],
    batch_size: int,
) -> list[Metric]:
    input_ids = tokenize_text(texts, tokenizer, spec.max_tokens)
    measured = token_perplexity(model, input_ids, spec.context, batch_size)
    return [
        Metric(f"{spec.name}/token_perplexity", measured.perplexity, "ppl"),
        Metric(f"{spec.name}/loss_nats", measured.loss_nats, "nats"),
    ]
