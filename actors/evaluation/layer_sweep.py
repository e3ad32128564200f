"""Many prunings of one model, one after another, without loading it again for each."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import EvaluationResult, EvaluationSpec, ModelRef, Progress, common_base, no_progress
from actors.evaluation.evaluate import evaluate_as_fits
from actors.evaluation.lm_eval.task_loading import check_task_data
from actors.models import build_model, depth, places, without_layers


class PruningEvaluator:
    """Evaluates `base` and prunings of it, which share its weights; loads it for the first.

    The numbers are those of models loaded afresh.
    """

    def __init__(self, base: ModelRef):
        self._base = base
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def evaluate(self, spec: EvaluationSpec, progress: Progress = no_progress) -> EvaluationResult:
        """Measure `spec.model`, which must be the base without some layers and nothing more.

        Raises as `evaluate_model` does.
        """
        check_task_data(spec.tasks, spec.include_path, spec.num_fewshot)
        if self._loaded is None:
            self._loaded = build_model(self._base, places())
        model, tokenizer = self._loaded
        positions = self._base.kept(len(self._base.dropped) + depth(model.config))
        lost = [positions.index(layer) for layer in spec.model.dropped if layer not in self._base.dropped]
        return evaluate_as_fits(without_layers(model, lost), tokenizer, spec, progress)


def evaluate_prunings(specs: Sequence[EvaluationSpec]) -> Iterator[tuple[int, EvaluationResult]]:
    """Yield the position and the result of each spec; their models must be prunings of one."""
    prunings = PruningEvaluator(common_base([spec.model for spec in specs]))
    yield from enumerate(map(prunings.evaluate, specs))
