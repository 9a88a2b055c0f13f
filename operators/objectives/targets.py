"""What DeAP's readouts learn from instance masks: ids and boundaries, as its release makes them. NumPy, for loaders.

Shapes: N masks in the order of their annotations, H W pixels.
"""

import numpy as np
from skimage.segmentation import find_boundaries


def instance_ids(masks_NHW: np.ndarray) -> np.ndarray:
    """Int32 [H, W]: 0 for background, n + 1 where mask n is the first that covers the pixel.

    DeAP lets the earlier annotation win where masks overlap; a mask that earlier ones cover wholly has no pixel. Raises
    `ValueError` unless masks are bool [N, H, W], N possibly 0.
    """
    masks = np.asarray(masks_NHW)
    if masks.ndim != 3 or masks.dtype != bool:
        raise ValueError(f"masks must be bool [N, H, W], got {masks.dtype} {masks.shape}")
    ids = np.zeros(masks.shape[1:], np.int32)
    for n in range(len(masks), 0, -1):
        ids[masks[n - 1]] = n
    return ids


def boundary_target(ids_HW: np.ndarray) -> np.ndarray:
    """Bool [H, W]: pixels near where ids change, background (0) counting as a region like any other.

    Both sides of a change, with diagonals, then widened by a window of H // 100 rows and W // 100 columns: 4 x 4 at 448 px,
    2 x 2 at 224, none below 200. Raises `ValueError` unless ids are whole numbers [H, W].
    """
    ids = np.asarray(ids_HW)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be whole numbers [H, W], got {ids.dtype} {ids.shape}")
    target = find_boundaries(ids, connectivity=2, mode="thick")
    for axis, side in enumerate(ids.shape):
        target = _widened(target, side // 100, axis)
    return target


def _widened(mask: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Dilation by a line of `size` pixels, which reaches one pixel further ahead than back where `size` is even.

    That is what scikit-image 0.26 does; with even sizes, its versions differ.
    """
    if size < 2:
        return mask
    padding = [(0, 0), (0, 0)]
    padding[axis] = ((size - 1) // 2, size // 2)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(np.pad(mask, padding), size, axis=axis).any(axis=-1))
