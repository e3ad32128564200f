"""The reference page of the criteria, from their table: `python -m actors.scoring.criteria_page`."""

import sys

from actors.scoring.criteria import CRITERIA, FixedCriterion, LayerCriterion, MergeCriterion, TaskCriterion

HEAD = """# Criteria

What `methods[].scoring.criterion` may name. This page is written from the table of criteria
(`python -m actors.scoring.criteria_page > docs/criteria.md`); a test keeps it so.

M is the current model of N layers, d a calibration sequence, h the last hidden state after the final norm,
x_i,t what layer i receives at token t (T the last), W_k the weight matrices of a layer. Sequences are
scored one by one without padding. Within a tie (1e-6, relative above 1) the deeper layer goes.

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
  gradients are held at a time. What the layers receive stays in memory, in half of the memory budget, and
  what does not fit is below `ITERABRE_CACHE` meanwhile.
- `magnitude_l1` and `magnitude_l2` leave out norms and biases, and so does `taylor`.
- `fixed` takes `scoring.layers`, a list of the unpruned model's layers, in the order in which it is written:
  a target takes as many from its beginning as it needs, so that shallower targets are stops on the way, as
  for every other criterion. No model is loaded for it.
- `task_metric` evaluates every model with one layer less on `scoring.task`, as many at a time as
  `execution.scoring.actors` says, each with the resources of an evaluation and the model loaded once. It
  runs in campaigns only.

`scoring.protected` names layers that stay, `{{first: 1, last: 1}}` or a list of the unpruned model's. They
are scored and reported like the others, and never chosen; runs of `angular_block` and `bridge_residual` keep
clear of them. Only with `eliminate` nothing is computed for them, and what is reported is their bound. `laco`
has `scoring.merge.lowest` and `highest` for that.

## Models larger than memory

With `scoring.stream_weights: true` the layers stay in the model's files, and each is read when it is due, the
next one meanwhile. That goes with every criterion but `task_metric` and `laco`. All sequences that fit into
`scoring.memory_budget_gb` pass a layer together, so that its weights are read once for all of them. `taylor`
reads each layer twice, there and back, whatever the budget; `bridge_residual` once for as many runs as have
room for their sums; `deepest`, `reverse` and `random` read no layer. Experts that are apart in the files are
joined as they are read, by the rules of transformers.

Of a mixture of experts, a token costs the budget the experts that it passes, not those that there are.

## Giving up layers early

`scoring.eliminate: true` gives a layer up as soon as it is proved not to be among the next to go; the
layers that go are those that scoring all on all sequences would choose, ties and their order included. It
goes with {bounded}, whose scores are means over sequences (or grow with one) of something that has a best
value: a cosine is at most 1, a next-token loss and a divergence are at least 0.

1. All layers are scored on a first portion of the sequences, a tenth.
2. Those in the lead, as many as will go, are scored on all sequences. The worst of their scores is the
   threshold.
3. Of every other layer the bound is the score that it would have if all sequences that it was not scored on
   said the best value. A layer whose bound is worse than the threshold by more than a tie and rounding
   (2e-6 for scores up to 1) is given up. What is left is scored on the next portion; a layer that takes the
   lead is scored on all sequences at once.

Sequences that cost least by their weight come first: the shortest with `hidden_cosine`, where all weigh
alike. How much this saves is a matter of the scores: a layer at a distance of 1 − c from the best value
needs the share (1 − c*) / (1 − c) of the sequences, c* being the winner's score. So much is saved with
`hidden_cosine` and `kl`, and little with `perplexity`, whose losses are far from 0.

The scored model's own stream of a sequence is kept at every layer while other layers have still to be
scored on the sequence, in at most a quarter of the memory budget; they begin at their own layer. What does
not fit is computed again. A pool of actors works round by round: each portion is divided by sequences and,
where it has fewer of these than there are actors, by layers. An actor that gets a sequence that another had
before computes its stream again. With `stream_weights` every round reads the files: eliminate then if scoring
all takes many waves, too.

Every score says what it is: in the ledger `score` is exact and `score_bound` the bound of a layer that was
given up; `iterabre score --eliminate` writes ≤ or ≥ before bounds. Where a family's config cannot be
without some layers, so that others than the best may have to go, a campaign scores all.

## Screening in bfloat16

`scoring.screen_dtype: bfloat16` scores a model of dtype float32 in bfloat16 first and then in float32, from
the layers that score best on: those are confirmed, as many as will go, and then every layer whose bfloat16
score comes within a margin of the last of them, until there is none. The margin is three times the largest
difference of the two scores seen on confirmed layers, and at least 0.001 of the score.

**This is a rule that measurements speak for, not a proof**: a layer that should go is missed if rounding
puts it farther from the best than three times as much as any confirmed one. It is off by default. With
`eliminate`, layers are given up in the bfloat16 pass, too, by bounds that must be worse by 0.001 of the
score, and then among the layers to confirm. The ledger has what was not confirmed as `score_screened` and
`score_screened_bound`, the command line marks it with ~. A copy of the weights in bfloat16 is in memory
beside the model.

## What is computed once

The last hidden states of the unpruned model are the same for every iteration, method and wave. They are
kept on the node, below `ITERABRE_CACHE`, by the contents of the model, its dtype, the kind of device, the
versions of torch and transformers, and the token ids; 8 GiB at most, the least recently read go first. The
first scoring, of the unpruned model itself, fills them; where they are found, the unpruned model is not
even loaded for `hidden_cosine`. With `reference: current`, and for models whose contents are not known,
they are kept for one scoring.

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
    bounded = ", ".join(
        f"`{name}`"
        for name, row in CRITERIA.items()
        if isinstance(row, LayerCriterion) and row.best is not None
    )
    rows = ""
    for name, row in CRITERIA.items():
        match row:
            case TaskCriterion():
                forwards = "N evaluations"
            case FixedCriterion():
                forwards = "none"
            case MergeCriterion():
                forwards = "by tries"
            case _:  # in terms of S and N, by its values for N = 10
                by_value = {0: "none", 10: "S·N", 20: "2·S·N", 55: "S·N(N+1)/2"}
                forwards = by_value[row.forwards(10, 1)]
        cells = [f"`{name}`", row.source, row.equation, "highest" if row.highest_first else "lowest"]
        cells += ["yes" if row.uses_sequences else "no", forwards]
        rows += f"| {' | '.join(cells)} |\n"
    return HEAD + rows + TAIL.format(bounded=bounded)


if __name__ == "__main__":
    sys.stdout.write(criteria_page())
