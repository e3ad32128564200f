"""`iterabre plan`: what a campaign would run, and what it would cost."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.options import complete_machines
from orchestrator.cli.output import out, print_json, print_table
from orchestrator.config import load_config
from orchestrator.errors import RequestError

DEFAULT_MACHINES = tuple(
    f"{count}x{name}"
    for name in ("H200-141G", "H100-80G", "A100-80G", "L40S-48G", "RTX-4090-24G")
    for count in (1, 8)
)


def plan(
    config: Annotated[
        Path, typer.Argument(help="Campaign file, e.g. configs/demo.yaml.", show_default=False)
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field of the campaign file. Repeatable.")
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(
            help="Devices to estimate for, e.g. 8xH100-80G; one of yours: see cost.machines. Repeatable.",
            show_default=False,
            autocompletion=complete_machines,
        ),
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="Scale times by what this earlier run took; it ran on --machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a campaign would run and cost; checks everything and starts nothing.

    What a run of that name has finished already is not counted again.
    """
    from orchestrator.execution.dry_run import campaign_stages
    from orchestrator.planning.cost_model import parse_machine
    from orchestrator.planning.estimate import plan_summary
    from orchestrator.planning.planner import build_plan
    from orchestrator.planning.recorded import continue_plan
    from orchestrator.storage.run_manifest import read_run
    from orchestrator.storage.stage_store import Store

    loaded = load_config(config, set_)
    if calibrate and len(machine or ()) != 1:
        raise RequestError("--calibrate needs one --machine, the one that the earlier run ran on")
    machines = [parse_machine(text, loaded.cost) for text in machine or DEFAULT_MACHINES]
    store = Store.of_config(loaded.storage, loaded.name)
    existing = store if store.cache is not None or read_run(store) is not None else None
    factors = _factors(calibrate, machines[0][1]) if calibrate else {}
    built, changes = continue_plan(build_plan(loaded), loaded, store)
    stages = campaign_stages(built, existing)
    summary = plan_summary(built, loaded, machines, stages, factors) | {"notes": built.notes}
    summary["changes"] = [f"{change} ({change.effect.value})" for change in changes]
    if as_json:
        print_json(summary)
        return
    _show(summary)


def _factors(run: str, machine: Any) -> dict[str, float]:
    from orchestrator.execution.dry_run import campaign_stages
    from orchestrator.planning.estimate import calibrate
    from orchestrator.planning.planner import build_plan
    from orchestrator.storage.ledger import Ledger
    from orchestrator.storage.run_manifest import recorded_config, recorded_store

    store = recorded_store(run, f"--calibrate {run!r}")
    config = recorded_config(store)
    built, ledger = build_plan(config), Ledger(store.ledger_uri).read()
    factors = calibrate(config, built, campaign_stages(built, store), ledger, machine)
    if not factors:
        raise RequestError(f"--calibrate {run!r}: that run has finished no stage yet")
    return factors


def _show(summary: dict[str, Any]) -> None:
    rows = summary["trajectories"]
    columns = {
        "trajectory": [row["trajectory"] for row in rows],
        "layers": [f"{row['layers']} → {', '.join(map(str, row['targets']))}" for row in rows],
        "iter": [str(row["iterations"]) for row in rows],
        "stages": [str(row["stages"]) for row in rows],
        "recovery\nFLOPs": [f"{row['recovery_flops']:.1e}" for row in rows],
    }
    print_table(columns, "What would run")
    count = summary["stages"]
    out.print(
        f"\nStages: {count['distinct']} to compute, where {count['planned']} are asked for "
        f"({count['shared']} shared). "
        f"Finished: {count['finished']}. To run: {count['to_run']}.\n"
    )
    kinds = summary["kinds"]
    columns = {
        "stage": [row["kind"] for row in kinds],
        "to run": [str(row["to_run"]) for row in kinds],
        "FLOPs": [f"{row['flops']:.2e}" for row in kinds],
        "GB a device": [f"{row['memory_bytes'] / 1e9:.2f}" for row in kinds],
    }
    print_table(columns, "Work, and peak memory")
    machines = summary["machines"]
    columns = {
        "devices": [f"{row['count']} x {row['machine']['name']}" for row in machines],
        "fits": ["yes" if row["fits"] else "no" for row in machines],
        "device hours": [f"{row['device_hours']:,.2f}" for row in machines],
        "hours at best": [f"{row['hours']:,.2f}" for row in machines],
        f"price\n{summary['currency']}": [f"{row['price']:,.2f}" for row in machines],
    }
    print_table(columns, "Estimate; docs/campaigns.md says what it assumes")
    out.print("Other machines: --machine, or cost.machines in the campaign file.\n", style="dim")
    methods = summary["methods"]
    columns = {
        "method": [row["method"] for row in methods],
        "to run": [str(row["to_run"]) for row in methods],
        "FLOPs": [f"{row['flops']:.1e}" for row in methods],
    }
    for position, machine in enumerate(methods[0]["machines"] if methods else ()):
        kind, _, memory = machine["machine"].rpartition("-")
        prices = [f"{row['machines'][position]['price']:,.2f}" for row in methods]
        columns[f"{kind}\n{memory}"] = prices
    print_table(columns, f"Price of each method, in {summary['currency']}, by type of device")
    for change in summary["changes"]:
        out.print(
            f"Changed since the run was recorded: {change}", markup=False, highlight=False, soft_wrap=True
        )
    for note in summary["notes"]:
        out.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    if summary["calibration"]:
        factors = ", ".join(f"{kind} x{factor:.2f}" for kind, factor in summary["calibration"].items())
        out.print(f"Times are scaled by the earlier run: {factors}")
