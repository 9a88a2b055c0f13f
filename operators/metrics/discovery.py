"""Unsupervised discovery of one object per image: TokenCut (arXiv 2202.11539) as LiFT evaluates it, and its score, CorLoc.

Tokens are the nodes of a graph whose edges are strong where cosines exceed a threshold. The second smallest generalised
eigenvector of its normalised cut splits them; the object is the connected part around the largest entry.

Cosines are taken where the map is, and only the graph comes to the host, a byte an edge where it is binary. The eigenvector
is LAPACK's: tokens often tie for the seed, then rounding decides, and the official boxes come of LAPACK's.

Shapes: C channels, h w tokens of a map, N = h * w.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg, ndimage
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from operators.metrics.similarity import finite_map

EPSILON = 1e-5
"""Weight of the edges between tokens that are not alike."""

_TIED = 1e-9
"""Entries of the eigenvector that differ by this share of the largest are one number and its rounding."""

Solver = Literal["official", "fast"]


@dataclass(frozen=True, kw_only=True)
class TokenCut:
    """Settings; the defaults are TokenCut's and LiFT's for VOC. LiFT's commands use `tau` 0.3 for COCO20k."""

    tau: float = 0.2
    "cosines above it are strong edges"
    weighted: bool = False
    "the ablation without a binary graph: strong edges keep their cosine as weight"
    solver: Solver = "official"
    """`official`: LAPACK's dense solver, as in the official code. Tokens with the same edges tie for the seed, which is
    common in binary graphs, and then rounding decides, differently on other machines. `fast`: Lanczos' method, 5 times
    faster at 28 x 28 tokens and more above, and of tied tokens one in the component that holds most of them."""


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """What was found in one image. `found` is False where all tokens are alike and the box is the whole image."""

    box: tuple[int, int, int, int]
    "x1, y1, x2, y2 in pixels of the image; x2 and y2 exclusive"
    mask_hw: np.ndarray
    "bool: the object's tokens"
    bipartition_hw: np.ndarray
    "bool: all tokens on the object's side of the cut"
    eigenvector_hw: np.ndarray
    "float64, positive at the seed"
    seed: tuple[int, int]
    "(row, column) of the token with the largest entry"
    found: bool


def discover(map_hwC: Tensor | np.ndarray, image_size: tuple[int, int], settings: TokenCut | None = None) -> Discovery:
    """The object in a map of an image (or canvas) of `image_size` (H, W) pixels that the tokens tile.

    Tokens needn't be normalised. The seed's component is taken, not the largest. An object on more than half of the tokens
    makes the seed fall into the background; that is the method's. Where the graph has no second eigenvector (one token, or
    all cosines on one side of tau, as with random weights) the official code's box is rounding noise; here it is the whole
    image. Raises `ValueError` on an empty map, NaN or infinity.
    """
    settings = settings or TokenCut()
    features = finite_map(map_hwC)
    grid = features.shape[0], features.shape[1]
    graph = affinity(features.flatten(0, 1), settings)
    if _is_uniform(graph):
        everything = np.ones(grid, bool)
        return Discovery(
            box=(0, 0, image_size[1], image_size[0]),
            mask_hw=everything,
            bipartition_hw=everything,
            eigenvector_hw=np.zeros(grid),
            seed=(0, 0),
            found=False,
        )
    return _cut(second_eigenvector(graph, settings.solver).reshape(grid), image_size, settings.solver)


def affinity(tokens_NC: Tensor, settings: TokenCut) -> np.ndarray:
    """Symmetric graph [N, N] of tokens on the host: float64 if binary, else float32 as the cosines are."""
    unit = F.normalize(tokens_NC, dim=1, eps=1e-12)
    cosines = unit @ unit.t()
    # Where a cosine is within rounding of tau, its two entries must agree all the same.
    cosines = torch.maximum(cosines, cosines.t())
    strong = cosines > settings.tau
    if settings.weighted:
        return torch.where(strong, cosines, EPSILON).cpu().numpy()
    return np.where(strong.cpu().numpy(), 1.0, EPSILON)


def _is_uniform(graph: np.ndarray) -> bool:
    """All edges between different tokens have one weight: every vector across them is an eigenvector."""
    if len(graph) < 2:
        return True
    between = graph[~np.eye(len(graph), dtype=bool)]
    return bool(np.ptp(between) <= 1e-6 * between.max())


def second_eigenvector(graph_NN: np.ndarray, solver: Solver = "official") -> np.ndarray:
    """Eigenvector float64 [N] of (D - A) v = lambda D v for the second smallest lambda, where D has the row sums of A."""
    graph = np.asarray(graph_NN, np.float64)
    degree = graph.sum(axis=1)
    if solver == "fast" and len(graph) > 32:
        try:
            return _lanczos(graph, np.sqrt(degree))
        except ArpackError:
            pass  # no convergence where eigenvalues crowd; the dense solver always has an answer
    _, vectors = linalg.eigh(np.diag(degree) - graph, np.diag(degree), subset_by_index=[1, min(2, len(graph) - 1)])
    return vectors[:, 0]


def _lanczos(graph: np.ndarray, root: np.ndarray) -> np.ndarray:
    """`root` is D^1/2: D^1/2 v is the second largest eigenvector of D^-1/2 A D^-1/2, whose largest one is `root` itself."""
    first = root / np.linalg.norm(root)

    def product(v: np.ndarray) -> np.ndarray:
        v = v.reshape(-1)
        # The known eigenvalue 1 is moved to -1, below all others.
        return graph @ (v / root) / root - 2 * first * (first @ v)

    operator = LinearOperator(graph.shape, matvec=product, dtype=np.float64)
    # The same each time, and without any symmetry that an eigenvector might have.
    start = np.random.default_rng(0).standard_normal(len(graph))
    _, vectors = eigsh(operator, k=1, which="LA", v0=start, maxiter=200)
    return vectors[:, 0] / root


def _cut(vector: np.ndarray, image_size: tuple[int, int], solver: Solver) -> Discovery:
    partition = vector > vector.mean()
    positive, n_positive = ndimage.label(partition)
    components = np.where(partition, positive, ndimage.label(~partition)[0] + n_positive)
    seed = _seed(np.abs(vector), components, solver)
    if not partition[seed]:
        vector, partition = -vector, ~partition
    mask = components == components[seed]
    return Discovery(
        box=_box(mask, image_size), mask_hw=mask, bipartition_hw=partition, eigenvector_hw=vector, seed=seed, found=True
    )


def _seed(sizes_hw: np.ndarray, components_hw: np.ndarray, solver: Solver) -> tuple[int, int]:
    index = int(sizes_hw.argmax())
    if solver == "fast":
        tied = np.flatnonzero(sizes_hw >= sizes_hw.max() * (1 - _TIED))
        ties_of = np.bincount(components_hw.ravel()[tied])
        index = int(tied[ties_of[components_hw.ravel()[tied]].argmax()])
    row, column = divmod(index, sizes_hw.shape[1])
    return row, column


def _box(mask: np.ndarray, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    (height, width), (h, w) = image_size, mask.shape
    rows, columns = np.nonzero(mask)
    x1, x2 = (int(edge * width / w) for edge in (columns.min(), columns.max() + 1))
    y1, y2 = (int(edge * height / h) for edge in (rows.min(), rows.max() + 1))
    return x1, y1, min(x2, width), min(y2, height)


def box_iou(box: Sequence[float], boxes: Iterable[Sequence[float]]) -> np.ndarray:
    """Intersection over union float64 [n] of one box with each of `boxes`, all x1, y1, x2, y2 without the last pixel's 1.

    Both terms are raised by 1e-7, as in the official code.
    """
    a, b = np.asarray(box, np.float64), np.asarray(list(boxes), np.float64).reshape(-1, 4)
    sides = np.minimum(a[2:], b[:, 2:]) - np.maximum(a[:2], b[:, :2])
    common = sides.clip(0).prod(axis=1)
    union = (a[2:] - a[:2]).prod() + (b[:, 2:] - b[:, :2]).prod(axis=1) - common
    return common / (union + 1e-7)


@dataclass(frozen=True, kw_only=True)
class CorLoc:
    """Images whose box has an IoU of at least 0.5 with any object's, of all images that have objects. Merged with `+`."""

    hits: int = 0
    images: int = 0

    @classmethod
    def of(cls, box: Sequence[float], objects: Sequence[Sequence[float]], *, threshold: float = 0.5) -> "CorLoc":
        """Of one image; without objects it counts neither way."""
        if not len(objects):
            return cls()
        return cls(hits=int(box_iou(box, objects).max() >= threshold), images=1)

    def __add__(self, other: "CorLoc") -> "CorLoc":
        return CorLoc(hits=self.hits + other.hits, images=self.images + other.images)

    @property
    def share(self) -> float:
        """Raises `ValueError` without images."""
        if not self.images:
            raise ValueError("no image with objects was evaluated")
        return self.hits / self.images
