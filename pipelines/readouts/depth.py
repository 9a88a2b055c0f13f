"""Depth: metres for each pixel, by DeAP's loss or ViT-Up's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from operators.metrics.depth import NYU_SIZE, DepthMetrics, SquaredError, average, eigen_crop, pooled_rmse, score_depth
from operators.objectives.dense import WARM_UP_CALLS, GradientForm, LossSum, deap_depth_loss, vit_up_depth_loss
from operators.readouts import Readout
from operators.visual import heat
from pipelines.config import ConfigError
from pipelines.readouts.task import Task, TaskSettings
from storage.datasets.labels import LabelledImage
from storage.datasets.registry import DATASETS, DatasetKind


@dataclass(frozen=True, kw_only=True)
class DepthRecord:
    """Of one image."""

    error: SquaredError
    metrics: DepthMetrics | None
    "None: no depth was measured"


@dataclass(frozen=True, kw_only=True)
class DepthTask(Task[DepthRecord]):
    """Metres for each pixel; 0 where none were measured."""

    objective: Literal["deap", "vit-up"] = "deap"
    gradient: GradientForm = "released"
    "vit-up: the form of the gradient loss"

    name: ClassVar[str] = "depth"
    label: ClassVar[Literal["depth"]] = "depth"
    judges_label: ClassVar[bool] = True
    target_names: ClassVar[tuple[str, ...]] = ("depth",)
    record: ClassVar[type[DepthRecord]] = DepthRecord
    empty: ClassVar[str] = "no depth was measured in what is judged of it"
    better: ClassVar[str] = "rmse_pooled"
    shares: ClassVar[tuple[str, ...]] = ("d1", "d2", "d3")

    @classmethod
    def of(cls, settings: TaskSettings, kind: DatasetKind, train: Sequence[LabelledImage]) -> "DepthTask":  # noqa: ARG003
        return cls(
            placement=settings.placement, side=settings.side, objective=settings.depth_loss, gradient=settings.gradient_loss
        )

    @property
    def outputs(self) -> int:
        return 1

    def targets(self, label: np.ndarray, item: int) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {"depth": self.placed(label)}

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:  # noqa: ARG002
        if self.objective == "deap":
            return deap_depth_loss(outputs_BCHW, targets["depth"])
        return vit_up_depth_loss(outputs_BCHW, targets["depth"], warm=step < WARM_UP_CALLS, form=self.gradient)

    def judge(self, output_CHW: Tensor, targets: Mapping[str, Tensor], label: np.ndarray | None) -> DepthRecord:
        """On the label's own pixels where the image was squashed (of NYU's, the Eigen crop), else on the square's.

        What is scored comes to the host, where its label was read: the prediction's one channel is no larger. The sums are
        NumPy's, in float64, so that they are the same wherever the prediction was made.
        """
        truth, found = label, output_CHW[0]
        if self.placement == "squash":
            found = F.interpolate(output_CHW[None], size=label.shape, mode="bilinear", align_corners=False)[0, 0]
            if truth.shape == NYU_SIZE:
                truth, found = eigen_crop(truth), eigen_crop(found)
        else:
            truth = targets["depth"].cpu().numpy()
        predicted = found.clamp(min=0).cpu().numpy()
        return DepthRecord(error=SquaredError.of(predicted, truth), metrics=score_depth(predicted, truth))

    def is_empty(self, record: DepthRecord) -> bool:
        return record.metrics is None

    def scores(self, records: Sequence[DepthRecord]) -> dict[str, float]:
        means = average(record.metrics for record in records if record.metrics)
        return {"rmse_pooled": pooled_rmse(record.error for record in records), **asdict(means)}

    def sums(self, records: Sequence[DepthRecord]) -> np.ndarray:
        none = (0.0,) * len(fields(DepthMetrics))
        rows = [
            (*astuple(each.error), *(astuple(each.metrics) if each.metrics else none), bool(each.metrics)) for each in records
        ]
        return np.array(rows, np.float64)

    def of_sums(self, sums_Bk: np.ndarray) -> dict[str, np.ndarray]:
        squares, pixels, *metrics, images = np.where(sums_Bk[:, -1:] > 0, sums_Bk, np.nan).T
        means = {field.name: each / images for field, each in zip(fields(DepthMetrics), metrics, strict=True)}
        return {"rmse_pooled": np.sqrt(squares / pixels), **means}

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        truth = targets["depth"].cpu().numpy()
        high = float(truth.max())
        return heat(output_CHW[0].cpu().numpy(), 0, high), heat(truth, 0, high)


def require_depth(dataset: str, depth_scale: float | None) -> None:
    """Raises `ConfigError` for a scale that is no scale, or where the data set's labels have none."""
    if depth_scale is None:
        return
    if not (depth_scale > 0 and math.isfinite(depth_scale)):
        raise ConfigError(f"--depth-scale {depth_scale}: must be above 0, the number of values that are a metre")
    if dataset in DATASETS and DATASETS[dataset].label != "depth":
        raise ConfigError(f"--depth-scale: {dataset} has {DATASETS[dataset].label}, no depth; leave it out")
