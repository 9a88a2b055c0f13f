"""What the cells of all papers are made on: a scale's backbones, weights and folders of data."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from pipelines.config import absolute
from pipelines.tables.papers import Job, PaperCell, PaperPlan, PapersConfig, PaperTable

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
"""mini's backbone; its weights may be below --root."""


@dataclass(frozen=True, kw_only=True)
class ScaledCells:
    """Makes cells as tables ask for them, each once, and gives their names. A paper's own are a subclass."""

    config: PapersConfig
    cells: dict[str, PaperCell] = field(default_factory=dict)

    own: ClassVar[str]
    "the backbone that every scale has, by the paper's name"
    models: ClassVar[Mapping[str, str]]
    "timm's names of the paper's backbones"
    folders: ClassVar[Mapping[str, str]]
    "mini's data sets, below --root"
    drawn: ClassVar[Mapping[str, str]]
    "debug's data sets"
    lacking: ClassVar[Job]
    "what a cell is called that nothing here can do"

    def add(self, cell: PaperCell) -> str:
        self.cells.setdefault(cell.name, cell)
        return cell.name

    def missing(self, name: str, why: str) -> str:
        """A cell that nothing here can do."""
        return self.add(PaperCell(name=name, job=self.lacking, missing=why))

    def plan(self, paper: str, tables: Iterable[PaperTable], *, counted: Collection[str] = ()) -> PaperPlan:
        """Of these cells. At other scales than the paper's each table of numbers says that it is of such, but those that are
        `counted`, which are the paper's at every scale."""
        scale, noted = self.config.scale, tuple(tables)
        if scale != "paper":
            recipe = ", trained by short recipes of our own (pipelines/TRAINING.md)" if scale == "mini" else ""
            note = f"of other data and backbones than the paper's (--scale {scale}){recipe}: a difference to it says little"
            noted = tuple(
                replace(each, notes=(*each.notes, note)) if each.wanted and each.number not in counted else each for each in noted
            )
        return PaperPlan(paper=paper, tables=noted, cells=self.cells)

    def model(self, backbone: str) -> str:
        """timm's name of a backbone."""
        given = self.config.pairs("backbone").get(backbone)
        return given or {"paper": self.models[backbone], "mini": TINY, "debug": "test_vit.r160_in1k"}[self.config.scale]

    def weights(self, backbone: str) -> str:
        """A backbone's weights, as --weights of a job has them."""
        scale, given = self.config.scale, self.config.pairs("weights").get(backbone)
        if scale == "mini" and not given and self.model(backbone) == TINY and self.config.root:
            return f"{absolute(self.config.root).rstrip('/')}/weights/{TINY}"
        return given or ("random" if scale == "debug" else "pretrained")

    def folder(self, dataset: str) -> str:
        """Of a data set; empty where there is none."""
        if given := self.config.pairs("data").get(dataset):
            return absolute(given)
        if self.config.scale == "mini" and self.config.root and dataset in self.folders:
            return f"{absolute(self.config.root).rstrip('/')}/{self.folders[dataset]}"
        return absolute(self.drawn[dataset]) if self.config.scale == "debug" and dataset in self.drawn else ""

    def lacks_backbone(self, backbone: str) -> str:
        """What to say of a backbone that only the paper's scale has; empty where it's there."""
        scale = self.config.scale
        if scale == "paper" or backbone == self.own or backbone in self.config.pairs("backbone"):
            return ""
        return f"the backbone {backbone}, which {scale} lacks: give --backbone {backbone}=TIMM_NAME"

    def lacks_data(self, *datasets: str) -> list[str]:
        """What to say of each data set that isn't there."""
        absent = [each for each in datasets if not self.folder(each)]
        return [f"the data set {each}: give --data {each}={'TARS' if each == 'photos' else 'FOLDER'}" for each in absent]
