from .shards import Shard, run_shards, shards_of
from .teacher import Teacher, teach_locally

__all__ = ["Shard", "Teacher", "run_shards", "shards_of", "teach_locally"]
