"""The hub's names of the data sets that tasks and texts are from, for an exported model's metadata."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from actors.contracts import TextSpec


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, as `dataset` of `model-index` has it."""

    path: str
    config: str | None = None
    split: str | None = None


WIKITEXT_2 = "Salesforce/wikitext", "wikitext-2-raw-v1"

BUILTIN_TEXTS: Mapping[str, HubDataset] = {
    "wikitext-2-raw-test": HubDataset(*WIKITEXT_2, "test"),
    "wikitext-2-raw-validation": HubDataset(*WIKITEXT_2, "validation"),
}

TASKS: Mapping[str, HubDataset] = {
    "arc_challenge": HubDataset("allenai/ai2_arc", "ARC-Challenge", "test"),
    "arc_easy": HubDataset("allenai/ai2_arc", "ARC-Easy", "test"),
    "boolq": HubDataset("aps/super_glue", "boolq", "validation"),
    "commonsense_qa": HubDataset("tau/commonsense_qa", None, "validation"),
    "copa": HubDataset("aps/super_glue", "copa", "validation"),
    "gsm8k": HubDataset("openai/gsm8k", "main", "test"),
    "hellaswag": HubDataset("Rowan/hellaswag", None, "validation"),
    "humaneval_plus": HubDataset("evalplus/humanevalplus", None, "test"),
    "humaneval_plus_instruct": HubDataset("evalplus/humanevalplus", None, "test"),
    "ifeval": HubDataset("google/IFEval", None, "train"),
    "lambada_openai": HubDataset("EleutherAI/lambada_openai", "default", "test"),
    "lambada_standard": HubDataset("cimec/lambada", None, "test"),
    "mbpp_plus": HubDataset("evalplus/mbppplus", None, "test"),
    "mbpp_plus_instruct": HubDataset("evalplus/mbppplus", None, "test"),
    "openbookqa": HubDataset("allenai/openbookqa", "main", "test"),
    "piqa": HubDataset("baber/piqa", None, "validation"),
    "race": HubDataset("EleutherAI/race", "high", "test"),
    "rte": HubDataset("nyu-mll/glue", "rte", "validation"),
    "sciq": HubDataset("allenai/sciq", None, "test"),
    "triviaqa": HubDataset("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    "truthfulqa_mc1": HubDataset("truthfulqa/truthful_qa", "multiple_choice", "validation"),
    "truthfulqa_mc2": HubDataset("truthfulqa/truthful_qa", "multiple_choice", "validation"),
    "wikitext": HubDataset("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
    "winogrande": HubDataset("allenai/winogrande", "winogrande_xl", "validation"),
    "xsum": HubDataset("EdinburghNLP/xsum", None, "test"),
}
"""Single tasks: `dataset_path` and the rest are those of lm-eval's task files, and of ours."""

FAMILIES: Mapping[str, HubDataset] = {
    "blimp": HubDataset("nyu-mll/blimp"),
    "mmlu": HubDataset("cais/mmlu"),
    "xnli": HubDataset("facebook/xnli"),
    "xstorycloze": HubDataset("juletxara/xstory_cloze"),
    "xwinograd": HubDataset("Muennighoff/xwinograd"),
}
"""Groups, with the tasks and groups whose names begin so."""


def task_dataset(name: str) -> HubDataset | None:
    """Return the data set of a task or group; None if it is none of those known here."""
    return TASKS.get(name) or FAMILIES.get(name.split("_")[0])


def text_dataset(text: TextSpec) -> HubDataset | None:
    """Return the data set of a text; None if it is a file."""
    if text.builtin is not None:
        return BUILTIN_TEXTS.get(text.builtin)
    return HubDataset(text.path, text.config, text.split) if text.path and is_hub_id(text.path) else None


def is_hub_id(path: str) -> bool:
    """Return whether `path` has the form of a hub id, OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None
