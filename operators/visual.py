"""Pictures of features: PCA to RGB, fitted once and applied to any map of the same channels."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RgbProjection:
    """Three principal components as colours: `mean` [C], `components` [3, C], `low` and `high` [3] (2nd, 98th percentile)."""

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, cells: np.ndarray) -> "RgbProjection":
        """Fit on cells [N, C] of any images; signs are fixed so that a refit on the same cells gives the same colours."""
        cells = np.asarray(cells, np.float64)
        mean = cells.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov(cells - mean, rowvar=False))
        components = vectors[:, ::-1][:, :3].T
        signs = np.sign(components[np.arange(3), np.abs(components).argmax(axis=1)])
        components = components * signs[:, None]
        projected = (cells - mean) @ components.T
        low, high = np.percentile(projected, [2, 98], axis=0)
        return cls(mean, components, low, high)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [..., C] to uint8 colours [..., 3]."""
        projected = (np.asarray(features, np.float64) - self.mean) @ self.components.T
        scaled = (projected - self.low) / np.maximum(self.high - self.low, 1e-12)
        return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)
