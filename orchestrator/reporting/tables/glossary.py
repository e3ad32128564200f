"""Every kind of metric in one sentence, for readers new to it."""

import re
from collections.abc import Iterable

from orchestrator.reporting.data.measured import direction

MEANINGS: tuple[tuple[str, str], ...] = (
    (
        r".*/token_perplexity",
        "How many tokens the model is torn between, on average, at each place of the text; 1 is certainty.",
    ),
    (
        r".*/word_perplexity",
        "Perplexity per word rather than per token, so that tokenizers can be compared.",
    ),
    (r".*/byte_perplexity", "Perplexity per byte rather than per token."),
    (r".*/bits_per_byte", "Logarithm of the perplexity per byte."),
    (
        r".*/loss_over_log_vocab",
        "Mean loss of the next token over that of a blind guess: 1 is no knowledge at all.",
    ),
    (r".*/loss_nats", "Mean negative log-probability of the next token, the logarithm of the perplexity."),
    (r"reasoning/mean", "Mean accuracy on IteRABRe's reasoning tasks: ARC, HellaSwag, COPA, PIQA."),
    (r"language/mean", "Mean accuracy on IteRABRe's language tasks: BLiMP, RACE, WinoGrande."),
    (r"knowledge/mean", "Mean accuracy on IteRABRe's knowledge tasks: BoolQ, MMLU."),
    (r"multilingual/mean", "Mean accuracy on XWinograd, XStoryCloze and XNLI in all their languages."),
    (r"classification/mean", "Mean accuracy on the seven choice tasks of On the Limits of Layer Pruning."),
    (
        r"generative/mean",
        "Mean score on the tasks of On the Limits of Layer Pruning that have the model write.",
    ),
    (r"blimp.*/acc", "How often the model finds the grammatical sentence of a pair likelier; chance is 0.5."),
    (
        r".*/acc",
        "Share of questions whose right answer is the likeliest; chance is one over the number of answers.",
    ),
    (r".*/ties", "Questions whose likeliest answer is exactly as likely as another: their order decides."),
    (r".*/acc_norm", "As acc, with likelihoods divided by the answers' length in bytes."),
    (r".*/exact_match.*", "Share of questions whose written answer is exactly the expected one."),
    (r".*/pass_at_1|.*/pass@1", "Share of programming tasks whose first attempt passes all tests."),
    (r".*/rouge.*", "Overlap of a written summary with one by a person."),
    (r".*/f1", "Mean of precision and recall."),
    (r"degeneration/repetition.*", "Share of four-word sequences of a text that the text has had before."),
    (
        r"speculative/acceptance_rate",
        "Share of the tokens drafted by this model that the unpruned one takes.",
    ),
    (r"speculative/speedup", "Decoding by the unpruned model with this one as its draft, over it alone."),
    (r"degeneration/self_bleu.*", "How alike texts on different prompts are; 1 is the same text again."),
    (r"arithmetic/top1", "Share of small sums at which the right digit is the likeliest."),
    (r"arithmetic/log_probability.*", "Log-probability of the right digit of a small sum."),
    (r".*/clean", "Share of written programs that compile and name nothing undefined."),
    (
        r"throughput/decode_tokens_per_second",
        "Tokens that the model writes in a second. Other load on the machine lowers it: see the speedup.",
    ),
    (
        r"throughput/prefill_tokens_per_second",
        "Tokens of a prompt that the model reads in a second. Other load on the machine lowers it.",
    ),
    (
        r"throughput/.*speedup",
        "Speed over that of the unpruned model, the two measured in turns on the same machine.",
    ),
)
"""A pattern of metrics' names and their meaning; the first that fits counts."""

BETTER = {"lower": "lower is better", "higher": "higher is better", None: ""}


def glossary(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """Return (metrics, meaning) of those that are explained; metrics of one meaning come together."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        meaning = next((text for pattern, text in MEANINGS if re.fullmatch(pattern, metric)), None)
        if meaning:
            better = BETTER[direction(metric)]
            found.setdefault(meaning + (f" {better.capitalize()}." if better else ""), []).append(metric)
    return [(", ".join(names), meaning) for meaning, names in found.items()]
