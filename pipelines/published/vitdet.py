"""ViTDet's recipe."""

from pipelines.published import Settings

VITDET_TRAINING: Settings = {
    "method": "mask_rcnn", "model": "base", "size": 1024, "batch": 64, "micro_batch": 1, "epochs": 101, "max_steps": 184_375,
    "lr": 1e-4, "weight_decay": 0.1, "schedule": "steps", "warmup_steps": 250, "net_precision": "bf16",
}  # fmt: skip
"""ViTDet (arXiv 2203.16527) on COCO, from MAE's weights, as its released configuration has it: 100 epochs, an image a GPU. It has
fp16 with scaled gradients, where this has bf16."""
