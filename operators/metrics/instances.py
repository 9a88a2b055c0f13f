"""How well pixel latents tell instances apart: k-means on the foreground, then the adjusted Rand index (ARI).

The score of DeAP's instance discrimination. Its paper names the method; restarts, seed and scaling aren't published. Ours:
scikit-learn's k-means, 10 restarts, latents as they are. A worker returns one number for each image, and the published score
is 100 times their mean.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

# scikit-learn is imported where it is used: it takes 4 s, in every worker of every readout.

RESTARTS = 10


def instance_ari(latents_CHW: Tensor | np.ndarray, ids_HW: Tensor | np.ndarray, *, seed: int = 0) -> float | None:
    """ARI of k-means clusters of the foreground's latents, k being the number of ids there, against the ids.

    0 in `ids_HW` is background. None where there is no foreground. An image of one instance has an ARI of 1 whatever its
    latents are; the published test set takes images of more than two. Raises `ValueError` where sizes differ or a latent
    isn't finite.
    """
    from sklearn.metrics import adjusted_rand_score

    latents, ids = torch.as_tensor(latents_CHW), torch.as_tensor(ids_HW)
    if latents.ndim != 3 or latents.shape[1:] != ids.shape:
        raise ValueError(f"latents [C, H, W] for ids [H, W] are needed, got {tuple(latents.shape)} and {tuple(ids.shape)}")
    latents_NC, ids_N = foreground_pixels(latents, ids)
    if not len(ids_N):
        return None
    return float(adjusted_rand_score(ids_N, cluster_pixels(latents_NC, len(np.unique(ids_N)), seed=seed)))


def foreground_pixels(latents_CHW: Tensor, ids_HW: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Latents [N, C] and ids [N] of the pixels whose id isn't 0, on the host: scikit-learn, which clusters them, runs there."""
    foreground = ids_HW != 0
    return latents_CHW[:, foreground].t().cpu().numpy(), ids_HW[foreground].cpu().numpy()


def cluster_pixels(latents_NC: np.ndarray, k: int, *, seed: int = 0) -> np.ndarray:
    """Clusters int32 [N], 0 to k - 1: the best of `RESTARTS` runs of k-means from `seed`.

    Fewer where latents have fewer different values. Raises `ValueError` where N is below k or a latent isn't finite.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    latents = np.ascontiguousarray(latents_NC, np.float32)
    if len(latents) < k or not np.isfinite(latents).all():
        raise ValueError(f"k-means needs finite latents of at least {k} pixels, got {latents.shape}")
    with warnings.catch_warnings():
        # Latents that are all alike are a bad score, not a fault.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(k, n_init=RESTARTS, random_state=seed).fit_predict(latents)
