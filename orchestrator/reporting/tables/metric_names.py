"""Every metric's name in words, and its meaning in a sentence, for readers new to it."""

import re
from collections.abc import Iterable

from orchestrator.reporting.data.accuracies import ABOVE_CHANCE, KEPT, MEAN_ACCURACY
from orchestrator.reporting.data.measured import direction

BEFORE_RECOVERY = " before recovery"

WHOLE = {
    MEAN_ACCURACY: "mean accuracy",
    KEPT: "accuracy kept, %",
    ABOVE_CHANCE: "kept above chance, %",
    "throughput/speedup": "decoding speed-up",
    "throughput/prefill_speedup": "prompt speed-up",
    "throughput/decode_tokens_per_second": "decoding, tokens/s",
    "throughput/prefill_tokens_per_second": "prompt, tokens/s",
    "degeneration/repetition_4": "repeated 4-grams",
    "degeneration/self_bleu_4": "self-BLEU",
    "arithmetic/top1": "digit sums right",
    "arithmetic/log_probability": "digit log-probability",
    "code_failures/clean": "clean programs",
    "speculative/acceptance_rate": "drafted tokens taken",
    "speculative/speedup": "speed-up as a draft",
}
"""Metrics whose name is not that of a subject and a measure."""
SUBJECTS = {
    "wikitext": "WikiText-2", "wikitext2": "WikiText-2", "c4": "C4", "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge", "hellaswag": "HellaSwag", "winogrande": "WinoGrande", "boolq": "BoolQ",
    "copa": "COPA", "piqa": "PIQA", "race": "RACE", "openbookqa": "OpenBookQA", "lambada_openai": "LAMBADA",
    "lambada_standard": "LAMBADA (standard)", "blimp": "BLiMP", "mmlu": "MMLU", "gsm8k": "GSM8K",
    "xsum": "XSum", "xwinograd": "XWinograd", "xstorycloze": "XStoryCloze", "xnli": "XNLI", "xcopa": "XCOPA",
    "humaneval": "HumanEval", "mbpp": "MBPP", "humaneval_plus": "HumanEval+", "mbpp_plus": "MBPP+",
}  # fmt: skip
MEASURES = {
    "token_perplexity": "perplexity", "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte", "loss_nats": "loss", "loss_over_log_vocab": "loss ÷ log V",
    "acc": "", "acc_norm": "(by length)", "exact_match": "exact match", "pass_at_1": "pass@1", "mean": "mean",
}  # fmt: skip
"""How a subject's measure is called behind it; an accuracy is what is meant by a task's name alone."""

MEANINGS: tuple[tuple[str, str], ...] = (
    (
        MEAN_ACCURACY,
        "Plain mean of the accuracies, chance included, each task or group of tasks counted once.",
    ),
    (
        re.escape(KEPT),
        "Per cent of the unpruned model's mean accuracy that is left.",
    ),
    (
        re.escape(ABOVE_CHANCE),
        "Per cent that is left of what the unpruned model's mean accuracy has above a blind guess.",
    ),
    (
        r".*/token_perplexity",
        "The next token is as uncertain as a choice between so many equally likely ones; 1 is certainty.",
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


def named(metric: str) -> str:
    """Return a metric's name in words, such as `WikiText-2 perplexity`; other columns keep their names."""
    name = metric.removesuffix(BEFORE_RECOVERY)
    if name in WHOLE:
        words = WHOLE[name]
    elif "/" in name:
        subject, _, measure = name.rpartition("/")
        measure, _, variant = measure.partition(",")
        subject = SUBJECTS.get(subject) or _of_group(subject) or subject.replace("_", " ")
        parts = (subject, MEASURES.get(measure, measure.replace("_", " ")), variant.replace("-", " "))
        words = " ".join(part for part in parts if part)
    else:
        words = name
    return words + metric[len(name) :]


def _of_group(subject: str) -> str | None:
    """Name a group's member after the group, as `BLiMP wh island`."""
    for group in ("blimp", "mmlu"):
        if subject.startswith(f"{group}_"):
            return f"{SUBJECTS[group]} {subject.removeprefix(f'{group}_').replace('_', ' ')}"
    return None


def arrow(metric: str) -> str:
    """Return the arrow in the direction in which a metric is better."""
    return {"lower": " ↓", "higher": " ↑", None: ""}[direction(metric.removesuffix(BEFORE_RECOVERY))]


def heading(metric: str) -> str:
    """Return a column's heading: the name in words, and the direction that is better."""
    return named(metric) + arrow(metric)


def meaning(metric: str) -> str:
    """Return what a metric is in a sentence, and which way is better; empty if nothing is known of it."""
    text = next((text for pattern, text in MEANINGS if re.fullmatch(pattern, metric)), "")
    better = BETTER[direction(metric)]
    return " ".join(filter(None, (text, f"{better.capitalize()}." if better else "")))


def hint(metric: str) -> str:
    """Return the raw name and the meaning, for a tooltip; empty for what is no metric."""
    name = metric.removesuffix(BEFORE_RECOVERY)
    if "/" not in name and name not in WHOLE:
        return ""
    return " – ".join(filter(None, ("" if name in (KEPT, ABOVE_CHANCE) else metric, meaning(name))))


def glossary(metrics: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return (names in words, raw names, meaning); metrics of one meaning come together."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        if any(re.fullmatch(pattern, metric) for pattern, _ in MEANINGS):
            found.setdefault(meaning(metric), []).append(metric)
    return [(", ".join(map(named, names)), ", ".join(names), text) for text, names in found.items()]
