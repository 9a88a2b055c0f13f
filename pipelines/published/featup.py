"""FeatUp's recipe."""

from pipelines.published import Paper, Settings

FEATUP = Paper(name="FeatUp", arxiv="2403.10516")

FEATUP_TRAINING: Settings = {"model": "vit_small_patch14_dinov2.lvd142m"}
"""One pass over COCO-Stuff's photographs in batches of 4, images of 224 px; what else there is to set has the published
value by default."""
