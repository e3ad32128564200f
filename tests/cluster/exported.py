"""What Prometheus would find at the port of Ray's metrics agent."""

import time
from urllib.request import urlopen

import ray

TIMEOUT_S = 60.0
"""Ray hands numbers on every 10 seconds."""


def exported(campaign: str, awaited: str) -> dict[str, float]:
    """The gauges of one campaign, by name and the values of their other labels, once `awaited` is there."""
    deadline = time.monotonic() + TIMEOUT_S
    while awaited not in (found := _exported_now(campaign)):
        assert time.monotonic() < deadline, found
        time.sleep(0.25)
    return found


def _exported_now(campaign: str) -> dict[str, float]:
    (node,) = ray.nodes()
    with urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("ray_iterabre_"):
            name, rest = line.split("{")
            labels, value = rest.split("} ")
            given = dict(label.replace('"', "").split("=", 1) for label in labels.split(","))
            chosen = [given[key] for key in ("trajectory", "state", "text") if key in given]
            if given["campaign"] == campaign:
                found[" ".join([name, *chosen])] = float(value)
    return found
