"""The reference page of the criteria, from their table: `python -m actors.scoring.criteria_page`."""

import sys

from actors.scoring.criteria import CRITERIA, MergeCriterion, TaskCriterion

HEAD = """# Criteria

What `methods[].scoring.criterion` may name. This page is written from the table of criteria
(`python -m actors.scoring.criteria_page > docs/criteria.md`); a test keeps it so.

M is the current model of N layers, d a calibration sequence, h the last hidden state after the final norm,
x_i,t what layer i receives at token t (T the last), W_k the weight matrices of a layer. Sequences are
scored one by one without padding. Within a tie (1e-6) the deeper layer goes.

| criterion | paper | computes for layer i | removed first | reads text | layer-forwards |
|---|---|---|---|---|---|
"""

TAIL = """
Layer-forwards are for S sequences and N layers, one scoring.

Every criterion but `laco` goes with both schedules. `iterative` scores again after each portion of
`schedule.layers_per_iteration` layers; `direct` takes all layers from one scoring.

- `angular_block` chooses the n layers of a portion together, as one run: all of them with `direct`, and
  `layers_per_iteration` of them with `iterative`. Any layer may begin the run, the first one too. Layers
  after which fewer than n are left get the score 1, the largest distance there is.
- `bridge_residual` chooses a run, too: the one that a linear map replaces best, which is how recovery with
  `linear_bridge` begins. A (D × D) comes from a ridge regression on tokens of the same norm. Each half of the
  sequences, those of even and of odd positions, is judged by the A of the other; two sequences are the
  least, some thousands of tokens (several times D) are better than the ten sentences that scoring
  reads by default. All sequences are scored by one actor. Layers after which fewer than n are left get
  the worst score.
- `hidden_cosine` and `kl` compare with the unpruned model or, with `reference: current`, with the current
  one; `pooling`, of `hidden_cosine` alone, is `flatten`, `token_mean` or `last_token`.
- `kl` compares the predictions at all tokens, over the whole vocabulary and in nats: what distillation with
  `logit_loss: forward_kl` makes small.
- `taylor` takes the gradient of the mean over sequences of the mean next-token loss. All sequences are
  scored by one actor, as the gradients are added up before their absolute value is taken; one layer's
  gradients are held at a time.
- `magnitude_l1` and `magnitude_l2` leave out norms and biases, and so does `taylor`.
- `task_metric` evaluates every model with one layer less on `scoring.task`, as many at a time as
  `execution.scoring.actors` says, each with the resources of an evaluation. It runs in campaigns only.

## Merging instead of removing

`laco` (Algorithm 1) goes from the top down: a layer takes in the `group` − 1 layers after it, and the merge
stays if the mean cosine to the unmerged model's last hidden states is above `threshold`. It ends when the
target's layers are removed, and is an error if they cannot be. The settings are those of `scoring.merge`. As
the merges make one pass and change the source's own weights, `laco` goes with `mode: direct` and
`recovery.objective: none` only. In Python it is `laco_compress` of `actors.scoring.laco`, and
`merge_layers` of `actors.models.pruning.merging` is a single merge, in two variants:

| variant | paper | the layer that stays |
|---|---|---|
| `differences` | Eq. 1 | θ_l + Σ_k (θ_l+k − θ_l), all parameters |
| `in_place` | the published code | matrices and biases of the last merged layer, norms of its own |

The published code takes each difference to the layer as the one before has left it, so that its sum
collapses.
"""


def criteria_page() -> str:
    """Return the whole page as Markdown."""
    rows = ""
    for name, row in CRITERIA.items():
        match row:
            case TaskCriterion():
                forwards = "N evaluations"
            case MergeCriterion():
                forwards = "by tries"
            case _:  # in terms of S and N, by its values for N = 10
                by_value = {0: "none", 10: "S·N", 20: "2·S·N", 55: "S·N(N+1)/2"}
                forwards = by_value[row.forwards(10, 1)]
        cells = [f"`{name}`", row.source, row.equation, "highest" if row.highest_first else "lowest"]
        cells += ["yes" if row.uses_sequences else "no", forwards]
        rows += f"| {' | '.join(cells)} |\n"
    return HEAD + rows + TAIL


if __name__ == "__main__":
    sys.stdout.write(criteria_page())
