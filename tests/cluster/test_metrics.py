"""The board's numbers for Prometheus, as Ray's metrics agent gives them."""

from orchestrator.execution.gauges import CampaignGauges
from orchestrator.storage.run_progress import TrajectoryProgress
from tests.cluster.exported import exported


def test_the_board_reaches_the_metrics_agent(ray_two_cpus: None) -> None:
    going = TrajectoryProgress(
        "a", 1, 3, "recover", key="r", stages_done=4, stages_total=19, stages_reused=2, waited_s=12.5,
        perplexities={"wikitext2": 8.5}, places=("w1 GPU 0", "w1 GPU 1"),
    )  # fmt: skip
    failed = TrajectoryProgress("b", 1, 3, "failed", finished=True, stages_done=1, stages_total=19)
    evaluation = TrajectoryProgress(
        "a", 1, 3, "evaluate", key="e", background=True, waits_for="room on the cluster"
    )
    CampaignGauges("gauged").show([going, evaluation, failed])
    assert exported("gauged", "ray_iterabre_stages_done a") == {
        "ray_iterabre_devices_in_use": 2,
        "ray_iterabre_stages_done a": 4,
        "ray_iterabre_stages_done b": 1,
        "ray_iterabre_stages_reused a": 2,
        "ray_iterabre_stages_reused b": 0,
        "ray_iterabre_stages_running": 1,
        "ray_iterabre_stages_total a": 19,
        "ray_iterabre_stages_total b": 19,
        "ray_iterabre_stages_waiting": 1,
        "ray_iterabre_token_perplexity a wikitext2": 8.5,
        "ray_iterabre_trajectories cancelled": 0,
        "ray_iterabre_trajectories ended": 0,
        "ray_iterabre_trajectories failed": 1,
        "ray_iterabre_trajectories running": 1,
        "ray_iterabre_waited_seconds a": 12.5,
        "ray_iterabre_waited_seconds b": 0,
    }
