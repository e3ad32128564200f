"""Scores on two nodes of a cluster of its own, takes one away after the first shard, and compares.

A process of its own: Ray can be started only once in one.
    python -m tests.cluster.lose_a_node MODEL CALIBRATION
"""

import os
import sys
import tempfile
import time

import ray
from ray.cluster_utils import Cluster

from actors.contracts import ActorPoolSpec, ModelRef, ModelSpec, ScoreSpec, TextSpec
from actors.scoring import ray as actor
from actors.scoring import score_locally
from actors.scoring.ray import ScoreActor, score_on_pool
from actors.scoring.score import Shard, ShardScores


class SlowActor(ScoreActor):
    """Takes its time, so that a shard is under way on each node when one is lost."""

    def work(self, shard: Shard) -> ShardScores:
        time.sleep(2)
        return super().work(shard)


def main() -> None:
    """Print how far the scores are apart and whether the layers come in the same order."""
    os.environ.update(RAY_memory_monitor_refresh_ms="0", RAY_USAGE_STATS_ENABLED="0")
    # Else other programs on this machine that call ray.init() would join this cluster.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    spec = ScoreSpec(model=ModelRef(ModelSpec(sys.argv[1])), calibration=TextSpec(path=sys.argv[2]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    removed: list[int] = []

    def lose_one(done: int, _total: int, _note: str = "") -> None:
        if not removed:
            removed.append(done)
            cluster.remove_node(nodes[0], allow_graceful=False)

    actor.ScoreActor = SlowActor  # type: ignore[misc]
    # Each takes more than half a node, so there is one on each, and the lost one finds no other place.
    got = score_on_pool(spec, ActorPoolSpec(2, cpus=0.6, gpus=0, start_timeout_s=300.0), lose_one)
    want = score_locally(spec)
    apart = max(abs(x - y) for x, y in zip(got.scores, want.scores, strict=True))
    print(
        "nodes lost:", len(removed), "same order:", got.removal_order == want.removal_order, "apart:", apart
    )
    print("forwards:", got.layer_forwards, want.layer_forwards)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
