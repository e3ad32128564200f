"""`configs/k8s/rayjob.yaml` against the fields and types of KubeRay's `ray.io/v1` RayJob.

The models name what `RayJobSpec`, `RayClusterSpec` and their parts in KubeRay's API reference have, and
refuse anything else, as the API server does with strict field validation. Pods are checked as far as
the file uses them.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROOT = Path(__file__).parents[2]
Count = Annotated[int, Field(ge=0, strict=True)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[KMGT]i?)?$")]
Text = Annotated[str, Field(strict=True, min_length=1)]
StartParams = dict[str, Annotated[str, Field(strict=True)]]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Resources(Part):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Mount(Part):
    name: Text
    mountPath: Text


class Volume(Part):
    name: Text
    configMap: dict[Literal["name"], Text] | None = None
    emptyDir: dict[Literal["medium", "sizeLimit"], Text] | None = None


class Container(Part):
    name: Text
    image: Text
    resources: Resources
    volumeMounts: list[Mount]


class Pod(Part):
    serviceAccountName: Text
    terminationGracePeriodSeconds: Count = 30
    containers: list[Container]
    volumes: list[Volume]
    tolerations: list[dict[Literal["key", "operator", "effect", "value"], Text]] = []


class Template(Part):
    spec: Pod
    metadata: dict[str, Any] = {}


class Head(Part):
    rayStartParams: StartParams
    template: Template


class Workers(Part):
    groupName: Text
    replicas: Count = 0
    minReplicas: Count
    maxReplicas: Count
    numOfHosts: Count = 1
    rayStartParams: StartParams
    template: Template


class Autoscaler(Part):
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    idleTimeoutSeconds: Count


class Cluster(Part):
    rayVersion: Text
    enableInTreeAutoscaling: Annotated[bool, Field(strict=True)]
    autoscalerOptions: Autoscaler
    headGroupSpec: Head
    workerGroupSpecs: list[Workers]


class Spec(Part):
    entrypoint: Text
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]
    backoffLimit: Count
    shutdownAfterJobFinishes: Annotated[bool, Field(strict=True)]
    ttlSecondsAfterFinished: Count
    rayClusterSpec: Cluster


class RayJob(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[Literal["name", "namespace", "labels"], Text]
    spec: Spec


@pytest.fixture
def document() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / "configs/k8s/rayjob.yaml").read_text())
    return read


def pods(job: RayJob) -> list[Pod]:
    cluster = job.spec.rayClusterSpec
    groups = [cluster.headGroupSpec, *cluster.workerGroupSpecs]
    return [group.template.spec for group in groups]


def test_every_field_is_one_of_kuberays(document: dict[str, Any]) -> None:
    RayJob.model_validate(document)
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minWorkers"] = 0
    with pytest.raises(ValidationError, match="minWorkers"):
        RayJob.model_validate(document)


def test_gpu_workers_start_from_zero_and_the_head_takes_no_work(document: dict[str, Any]) -> None:
    cluster = RayJob.model_validate(document).spec.rayClusterSpec
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    assert cluster.enableInTreeAutoscaling
    for group in cluster.workerGroupSpecs:
        assert (group.replicas, group.minReplicas) == (0, 0)
        assert group.maxReplicas > 0
        assert group.template.spec.containers[0].resources.limits["nvidia.com/gpu"] >= "1"


def test_every_mount_has_its_volume_and_the_campaign_is_where_the_command_reads_it(
    document: dict[str, Any],
) -> None:
    job = RayJob.model_validate(document)
    for pod in pods(job):
        mounts = {mount.name: mount.mountPath for mount in pod.containers[0].volumeMounts}
        assert mounts.keys() == {volume.name for volume in pod.volumes}
        assert f" {mounts['campaign']}/campaign.yaml " in job.spec.entrypoint


def test_the_versions_are_those_of_the_constraints(document: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert RayJob.model_validate(document).spec.rayClusterSpec.rayVersion == pinned[1]
    image = (ROOT / "configs/k8s/Dockerfile").read_text()
    assert f"FROM rayproject/ray:{pinned[1]}-" in image


def test_no_credentials_are_written_down(document: dict[str, Any]) -> None:
    assert not re.search(r"secret|password|access_?key|token", yaml.safe_dump(document), re.IGNORECASE)
