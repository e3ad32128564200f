"""The board's numbers for Prometheus, as Ray's metrics agent gives them."""

from orchestrator.execution.gauges import CampaignGauges
from orchestrator.storage.run_progress import TrajectoryProgress
from tests.cluster.exported import exported


def test_the_board_reaches_the_metrics_agent(ray_two_cpus: None) -> None:
    going = TrajectoryProgress(
        "a", 1, 3, "recover", stages_done=4, stages_total=19, stages_reused=2, perplexities={"wikitext2": 8.5}
    )
    failed = TrajectoryProgress("b", 1, 3, "failed", finished=True, stages_done=1, stages_total=19)
    CampaignGauges("gauged").show([going, failed])
    assert exported("gauged", "ray_iterabre_stages_done a") == {
        "ray_iterabre_stages_done a": 4,
        "ray_iterabre_stages_done b": 1,
        "ray_iterabre_stages_reused a": 2,
        "ray_iterabre_stages_reused b": 0,
        "ray_iterabre_stages_total a": 19,
        "ray_iterabre_stages_total b": 19,
        "ray_iterabre_token_perplexity a wikitext2": 8.5,
        "ray_iterabre_trajectories ended": 0,
        "ray_iterabre_trajectories failed": 1,
        "ray_iterabre_trajectories running": 1,
    }
