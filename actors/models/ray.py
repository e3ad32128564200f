"""Export on Ray."""

from actors.contracts import ExportResult, ExportSpec
from actors.ray_pool import run_in_task


def export_on_ray(spec: ExportSpec, uri: str, *, cpus: float, gpus: float) -> ExportResult:
    """Export as a task of its own, run again on another one if its machine is lost."""
    return run_in_task(_export, spec, uri, cpus=cpus, gpus=gpus)


def _export(spec: ExportSpec, uri: str) -> ExportResult:
    from actors.models.exporting.export import export_model

    return export_model(spec, uri)
