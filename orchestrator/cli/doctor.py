"""What a machine or a cluster lacks for a campaign, and what mends it."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement

from actors.artifacts import cache_dir, local_path
from orchestrator.errors import RequestError
from orchestrator.execution.connection import LOCAL, cluster_address

State = Literal["ok", "note", "fail"]
NEEDED_GB = 20
"""Free disk below which a run of a small model's adapters and exports is likely to stop."""

SHARED_MEMORY_GB = 2
ANSWER_TIMEOUT_S = 10


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` says what to do, unless all is well."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Place:
    """What is examined: the cluster at `address` (None: none) and the storage that a campaign would use."""

    address: str | None
    storage: str


def examine(place: Place) -> Iterator[Finding]:
    """Yield every finding, the cheap ones first; start nothing and change nothing."""
    for check in CHECKS:
        yield from check(place)


def check_python(_place: Place) -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if fine else "fail", found, "" if fine else "install Python 3.11 or newer")


def check_packages(_place: Place) -> Iterator[Finding]:
    """Compare the installed packages with those that the project requires, without its extras."""
    try:
        lines = requires("iterabre") or []
    except PackageNotFoundError:
        lines = []
    wrong = []
    for requirement in (Requirement(line) for line in lines if not re.search(r"\bextra\b", line)):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    remedy = "" if not wrong else "pip install -c constraints.txt -e . in the project's folder"
    yield Finding("packages", "fail" if wrong else "ok", "; ".join(wrong) or "all as required", remedy)


def check_gpus(_place: Place) -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    if count:
        gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
        found = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
        yield Finding("GPUs", "ok", f"{found}; torch {torch.__version__}")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "GPUs",
            "fail",
            f"there is a driver, but torch {torch.__version__} sees no GPU",
            "install a torch built for your CUDA: https://pytorch.org/get-started/locally",
        )
    else:
        yield Finding("GPUs", "note", f"none here; torch {torch.__version__}", "fine for a head node")


def check_disk(place: Place) -> Iterator[Finding]:
    """Measure what is free for the cache and for a local storage; try to write to a remote one."""
    yield _local_disk("cache", str(cache_dir()))
    if directory := local_path(place.storage):
        yield _local_disk("storage", str(directory))
        return
    from orchestrator.storage.stage_store import Store

    try:
        Store(place.storage).check_writable(limit_s=ANSWER_TIMEOUT_S)
    except RequestError as error:
        remedy = (
            "check credentials, network and the bucket's name; AWS_ENDPOINT_URL names a store of your own"
        )
        why = re.search(r"\((.*)\)", str(error), re.DOTALL)  # what the store itself says
        found = f"{place.storage} cannot be written: {why[1]}" if why else str(error)
        yield Finding("storage", "fail", found, remedy)
    else:
        yield Finding("storage", "ok", f"{place.storage} can be written")


def check_shared_memory(_place: Place) -> Iterator[Finding]:
    """Measure /dev/shm, where Ray keeps its objects; containers often give 64 MB."""
    if not os.path.isdir("/dev/shm"):
        return
    size_gb = shutil.disk_usage("/dev/shm").total / 1e9
    if size_gb < SHARED_MEMORY_GB:
        remedy = "start the container with --shm-size=8g; Ray falls back to the disk, slowly"
        yield Finding("shared memory", "note", f"{size_gb:.1f} GB", remedy)
    else:
        yield Finding("shared memory", "ok", f"{size_gb:.1f} GB")


def check_hub(_place: Place) -> Iterator[Finding]:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("model hub", "note", "HF_HUB_OFFLINE is set", "models and data must be local files")
        return
    try:
        HfApi().model_info("HuggingFaceTB/SmolLM2-135M-Instruct", timeout=ANSWER_TIMEOUT_S)
    except Exception as error:  # whatever the network, a proxy or the hub does
        remedy = "without it, give models and data as local paths; behind a mirror, set HF_ENDPOINT"
        yield Finding("model hub", "note", f"out of reach ({type(error).__name__})", remedy)
        return
    yield Finding("model hub", "ok", constants.ENDPOINT)


def check_cluster(place: Place) -> Iterator[Finding]:
    """Report what the cluster could give, were it idle."""
    try:
        if cluster_address(place.address) == LOCAL:
            remedy = "name one with --address auto or HOST:PORT"
            yield Finding("Ray cluster", "note", "none asked for", remedy)
            return
        from orchestrator.execution.cluster import nodes_at

        nodes = nodes_at(place.address)
    except RequestError as error:
        found, _, remedy = str(error).partition("; ")
        yield Finding("Ray cluster", "fail", found, remedy)
        return
    growth = "" if all(node.is_up for node in nodes) else "with what its autoscaler may add: "
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    yield Finding("Ray cluster", "ok", f"{growth}{cpus:g} CPUs, {gpus:g} GPUs")


CHECKS: tuple[Callable[[Place], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_disk,
    check_shared_memory,
    check_gpus,
    check_hub,
    check_cluster,
)


def _local_disk(name: str, path: str) -> Finding:
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(os.path.abspath(existing))
    free_gb = shutil.disk_usage(existing).free / 1e9
    if not os.access(existing, os.W_OK):
        return Finding(name, "fail", f"{path} cannot be written", "choose another place or mend its owner")
    low = free_gb < NEEDED_GB
    remedy = "free some, or set another place" if low else ""
    return Finding(name, "note" if low else "ok", f"{path}: {free_gb:.0f} GB free", remedy)
