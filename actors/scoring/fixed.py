"""`fixed`: layers that somebody has chosen already, such as a paper's list or that of another tool."""

from actors.contracts import ScoreResult, ScoreSpec
from actors.models import depth
from actors.models.loading.load import load_config


def fixed_result(spec: ScoreSpec) -> ScoreResult:
    """Return the order of `spec.layers`, as far as they are in the model still; no model is loaded.

    A layer's score is the number of layers from it to the end of the list, 0 for one that is not in it.
    """
    kept = spec.model.kept(depth(load_config(spec.model.source)))
    left = {layer: len(spec.layers) - place for place, layer in enumerate(spec.layers) if layer in kept}
    scores = tuple(float(left.get(layer, 0)) for layer in kept)
    return ScoreResult(kept, scores, tuple(left), num_sequences=0, num_tokens=0, layer_forwards=0)
