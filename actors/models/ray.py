"""Export on Ray."""

from dataclasses import replace

from actors.contracts import ActorPoolSpec, ExportResult, ExportSpec, Progress, no_progress
from actors.ray_pool import ActorPool


class ExportActor:
    """Writes a model as a Hugging Face directory."""

    def work(self, request: tuple[ExportSpec, str]) -> ExportResult:
        """Write the model of the spec at the URI."""
        from actors.models.exporting.export import export_model

        return export_model(*request)


def export_on_ray(
    spec: ExportSpec, uri: str, pool: ActorPoolSpec, progress: Progress = no_progress
) -> ExportResult:
    """Export on an actor of its own, again on another one if its machine is lost."""
    with ActorPool(replace(pool, actors=1), ExportActor, setting="export", progress=progress) as actors:
        ((_, result),) = actors.dispatch([(spec, uri)])
        return result
