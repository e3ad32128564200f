"""Four methods, three targets and two seeds on SmolLM2 and three tiny random models, as one Ray job.

    python -m benchmarks.campaign [--tasks copa,arc_easy --include-path DIR] [--without-smollm2]

Submits `configs/campaigns/four-methods.yaml`, with the tiny models added, to a head of its own by
`ray job submit`, and prints how many stages were planned, shared and executed, and what the same grid
takes cell by cell. A run that was stopped goes on when the command is given again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.support.job_head import head, token
from tests.support.tiny_models import tiny_model, tiny_tokenizer

PROJECT = Path(__file__).parent.parent
CAMPAIGN = PROJECT / "configs/campaigns/four-methods.yaml"
FAMILIES: dict[str, dict[str, int]] = {
    "llama": {"num_hidden_layers": 10},
    "qwen2": {"num_hidden_layers": 10},
    "gpt2": {"num_hidden_layers": 10, "n_layer": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=Path("runs"), help="where models and run are written"
    )
    parser.add_argument("--tasks", default="", help="lm-eval tasks beside blimp_sample, with commas")
    parser.add_argument("--include-path", help="directory with their definitions")
    parser.add_argument("--limit", type=int, default=20, help="documents of a task")
    parser.add_argument("--without-smollm2", action="store_true")
    parser.add_argument("--cpus", type=int, default=2)
    arguments = parser.parse_args()
    file = write_campaign(arguments)
    with token(), head(arguments.cpus) as address:
        seconds = submit(address, file)
    print(f"The job took {seconds:,.0f} s.")
    tell_stages(file)


def write_campaign(arguments: argparse.Namespace) -> Path:
    """The campaign of `CAMPAIGN` with the tiny models; its file is written beside the run."""
    directory = arguments.directory.resolve()
    campaign: dict[str, Any] = yaml.safe_load(CAMPAIGN.read_text())
    models = [] if arguments.without_smollm2 else campaign["models"]
    campaign["models"] = models + [save_tiny(family, directory / "models") for family in FAMILIES]
    campaign["storage"] = {"path": str(directory)}
    campaign["evaluation"]["tasks"] += [task for task in arguments.tasks.split(",") if task]
    campaign["evaluation"] |= {"limit": arguments.limit, "include_path": arguments.include_path}
    file: Path = directory / f"{campaign['name']}.yaml"
    file.write_text(yaml.safe_dump(campaign, sort_keys=False))
    return file


def save_tiny(family: str, directory: Path) -> dict[str, str]:
    """Save a random model of ten layers, if it is not there yet; its entry of the campaign file."""
    path = directory / family
    if not path.exists():
        tiny_model(family, **FAMILIES[family]).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    return {"id": f"tiny-{family}", "path": str(path)}


def submit(address: str, file: Path) -> float:
    """Run the campaign as a job of the cluster, printing what it prints; seconds it took."""
    start = time.monotonic()
    entrypoint = [sys.executable, "-m", "orchestrator.cli", "campaign", str(file), "--resume"]
    job = ["job", "submit", f"--address={address}", "--working-dir=.", "--", *entrypoint]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *job], cwd=PROJECT, check=True)
    return time.monotonic() - start


def tell_stages(file: Path) -> None:
    """Print what was planned, shared and executed, and what the grid takes cell by cell."""
    stages = planned(file)
    executed = len(list((file.parent / file.stem).glob("stages/*/*/manifest.json")))
    # A cell by itself: each model, method and seed with one target alone, none of them shared.
    targets = yaml.safe_load(file.read_text())["targets"]
    alone = sum(planned(file, f"--set=targets=[{json.dumps(target)}]")["planned"] for target in targets)
    print(
        f"Stages: {stages['planned']} asked for, {stages['shared']} of them shared; {executed} executed. "
        f"Cell by cell the grid takes {alone} ({executed / alone:.2f})."
    )


def planned(file: Path, *options: str) -> dict[str, int]:
    """Return the counts of stages that `iterabre plan` gives."""
    command = [sys.executable, "-m", "orchestrator.cli", "plan", str(file), "--json", *options]
    plan = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    counts: dict[str, int] = json.loads(plan.stdout)["stages"]
    return counts


if __name__ == "__main__":
    main()
