"""JAFAR's recipe."""

from pipelines.published import Paper, Settings

JAFAR = Paper(name="JAFAR", arxiv="2506.11136")

JAFAR_TRAINING: Settings = {"model": "vit_small_patch14_dinov2.lvd142m", "max_steps": 100_000}
"""On ImageNet-1k in batches of 4, images of 448 px; what else there is to set has the published value by default."""
