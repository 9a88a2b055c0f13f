"""The tasks that readouts are trained and judged on, by name. A new one is a module beside these, and a name here."""

from collections.abc import Mapping

from pipelines.readouts.depth import DepthTask
from pipelines.readouts.detection import DetectionTask
from pipelines.readouts.instances import BoundaryTask, InstanceTask
from pipelines.readouts.segmentation import SegmentationTask
from pipelines.readouts.task import Task
from storage.documents import JsonValue

TASKS: Mapping[str, type[Task]] = {
    each.name: each for each in (SegmentationTask, DepthTask, BoundaryTask, DetectionTask, InstanceTask)
}


def parse_task(found: Mapping[str, JsonValue]) -> Task:
    """From `Task.as_json` and the `name`, as a checkpoint has them. Raises `ValueError`, `KeyError` or `TypeError`."""
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return TASKS[settings.pop("name")](**settings)
