"""Recipes of our own for short trainings on few photographs: what presets of jobs/train.py and the papers' tables at the scale
`mini` share. Why each setting is needed, and what it is worth, was measured (pipelines/TRAINING.md)."""

from collections.abc import Mapping

from storage.documents import JsonValue

LIFT_SHORT: Mapping[str, JsonValue] = {
    "lower": "resized", "interpolation": "bicubic", "jitter": 0.0, "keep_maps": True, "relational_images": 4,
    "batch": 16, "lr": 2e-3, "schedule": "cosine", "warmup_steps": 20,
}  # fmt: skip
"""Of `X2Config`. Which distance, and the weight of relations beside it, depend on the backbone and the steps; LiFT
itself starts as the enlargement."""

VIT_UP_SHORT: Mapping[str, JsonValue] = {
    "size": 448, "teacher_sizes": (224, 448), "hidden_size": 224, "query_size": 896, "hidden_states": (0, 4, 8, 12),
    "start": "enlargement", "relational_weight": 10.0, "relational_tau": 0.05, "relational_itself": True, "net_precision": "fp32",
    "strength": 0.0, "chunk_blocks": 256, "batch": 4, "max_steps": 150, "lr": 5e-4, "warmup_steps": 10, "val_rows": 8,
}  # fmt: skip
"""Of `ViTUpTraining`: six hundred photographs, once each."""
