"""Environment of every test process and of the commands it starts."""

import os

# Tiny models gain nothing from threads, and idle OpenMP threads steal time from the other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the tests may ask a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
