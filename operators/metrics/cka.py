"""Linear CKA between features of the same images at several sizes: LiFT's measure of scale invariance (Fig. 4).

Each image is one sample and its whole map is flattened, so that only Gram matrices over a batch's images are compared, and
maps may be of any size. The measure depends on which images share a batch: fix the batches, and make one `HsicTerms` of each.
LiFT cites torch_cka, and names neither batches nor the number of images.

Shapes: n images of a batch, S sizes (or networks) that are compared.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Estimator = Literal["unbiased", "biased"]
"""`unbiased` is torch_cka's; `biased` centres features and compares Frobenius norms, which gives far higher values where
images are few and features many. The two don't mix."""


@dataclass(frozen=True, kw_only=True)
class HsicTerms:
    """One batch: HSIC of each pair of sizes, as nested lists [S, S]. `batch` is its number in the fixed batching."""

    batch: int
    images: int
    terms: tuple[tuple[float, ...], ...]


def terms_of_grams(batch: int, grams: Sequence[Tensor], *, estimator: Estimator = "unbiased", rescale: bool = False) -> HsicTerms:
    """Terms of a batch from the Gram matrices [n, n] (`gram`) of its features at S sizes, of the same images in the same order.

    `rescale` maps each Gram matrix to 0..1 by its smallest and largest entry first, as vit_analysis does; that weighs
    batches otherwise. Raises `ValueError` where n differs, or is below 4 (unbiased) or 2.
    """
    count = {len(each) for each in grams}
    least = 4 if estimator == "unbiased" else 2
    if len(count) != 1 or min(count) < least:
        raise ValueError(f"each size needs the same images, at least {least}, in a batch; got {sorted(count)}")
    if rescale:
        grams = [(each - each.min()) / (each.max() - each.min()).clamp(min=1e-300) for each in grams]
    hsic = hsic_unbiased if estimator == "unbiased" else hsic_biased
    # Symmetric to the last digit, so that each pair is computed once; all come to the host together.
    pairs = [(i, j) for i in range(len(grams)) for j in range(i + 1)]
    found = dict(zip(pairs, torch.stack([hsic(grams[i], grams[j]) for i, j in pairs]).tolist(), strict=True))
    rows = tuple(tuple(found[max(i, j), min(i, j)] for j in range(len(grams))) for i in range(len(grams)))
    return HsicTerms(batch=batch, images=count.pop(), terms=rows)


def gram(features: Tensor, max_bytes: int = 2**26) -> Tensor:
    """Float64 [n, n] of dot products between flattened maps [n, ...].

    Summed over blocks of channels and cells, whose float64 copies stay below `max_bytes`. Raises `ValueError` for NaN or
    infinity.
    """
    flat = features.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for block in flat.split(max(1, max_bytes // (8 * len(flat))), dim=1):
        total.addmm_(block.double(), block.double().t())
    if not total.isfinite().all():
        raise ValueError("features hold NaN or infinity; rows of failed samples in a store are NaN: leave them out")
    return total


def hsic_unbiased(gram_K: Tensor, gram_L: Tensor) -> Tensor:
    """HSIC_1 of two Gram matrices [n, n], n at least 4; may be negative."""
    n = len(gram_K)
    k, m = (matrix - torch.diag(matrix.diagonal()) for matrix in (gram_K, gram_L))
    trace, sums = (k * m).sum(), k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (trace + sums - 2 * (k.sum(dim=0) @ m.sum(dim=0)) / (n - 2)) / (n * (n - 3))


def hsic_biased(gram_K: Tensor, gram_L: Tensor) -> Tensor:
    """The product of two centred Gram matrices [n, n]; with linear kernels the squared Frobenius norm of the covariance."""
    return (_centred(gram_K) * _centred(gram_L)).sum()


def _centred(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(dim=0) - matrix.mean(dim=1, keepdim=True) + matrix.mean()


def cka(batches: Iterable[HsicTerms]) -> Tensor:
    """CKA float64 [S, S]: terms are averaged over batches before the ratio is taken.

    The same to the last digit in whatever order batches come. NaN where a size's own term isn't positive (all its features
    alike, or too few images). Raises `ValueError` without batches, where one is there twice, or with other sizes.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch to take CKA of")
    if len({each.batch for each in batches}) < len(batches) or len({len(each.terms) for each in batches}) > 1:
        raise ValueError("each batch must be there once, with the same sizes")
    sizes = range(len(batches[0].terms))
    # fsum rounds once, so that the order doesn't matter.
    means = [[math.fsum(each.terms[i][j] for each in batches) / len(batches) for j in sizes] for i in sizes]
    terms = torch.tensor(means, dtype=torch.float64)
    own = terms.diagonal()
    return torch.where((own > 0)[:, None] & (own > 0), terms / (own[:, None] * own).sqrt(), torch.nan)


def batch_sums(batches: Sequence[HsicTerms]) -> np.ndarray:
    """What each batch adds to `cka`'s sums, float64 [n, S * S]."""
    return np.array([each.terms for each in batches], np.float64).reshape(len(batches), -1)


def cka_of_sums(sums_Bk: np.ndarray) -> np.ndarray:
    """CKA [B, S * S] of sums of `batch_sums`, row by row; NaN where a size's own term isn't positive."""
    sizes = math.isqrt(sums_Bk.shape[1])
    terms = sums_Bk.reshape(-1, sizes, sizes)
    own = np.einsum("bii->bi", terms)
    of_both = np.sqrt(np.where(own > 0, own, np.nan))
    return (terms / (of_both[:, :, None] * of_both[:, None])).reshape(len(terms), -1)
