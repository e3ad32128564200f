"""Many prunings of one model, one after another, without loading it again for each."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import EvaluationResult, EvaluationSpec
from actors.evaluation.evaluate import evaluate
from actors.models import without_layers


def evaluate_prunings(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, specs: Iterable[EvaluationSpec]
) -> Iterator[tuple[int, EvaluationResult]]:
    """Evaluate each spec's model, which must be `source` without some layers and nothing more.

    Gives each result with its spec's position. The prunings share the weights of
    `source`, which stays as it is; the numbers are those of a model loaded afresh.
    """
    for position, spec in enumerate(specs):
        yield position, evaluate(without_layers(source, spec.model.dropped), tokenizer, spec)
