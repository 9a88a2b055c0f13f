"""Classes of vectors: votes of the nearest, and multinomial logistic regression. Memory stays within chunks of rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_ROWS, TRAIN_ROWS = 512, 65_536
"""Rows of one product: 128 MiB of cosines."""

FIT_ROWS = 16_384

GUESSES = 5
"""Classes that are given for a row, the likeliest first; all where there are fewer."""

MAX_ITERATIONS = 500


def knn_votes(
    train: Tensor, labels: Tensor, queries: Tensor, n_classes: int, k: int, temperature: float, *, device: str = "cpu"
) -> Tensor:
    """The likeliest classes of `queries` [m, C] by their `k` nearest of `train` [n, C], int64 [m, up to 5].

    Vectors are compared by cosine; each neighbour adds exp(cosine / temperature) to its class (Wu et al., arXiv 1805.01978,
    section 3.4). Of equal sums the lower class comes first. `labels` are int64 [n].
    """
    k = min(k, len(train))
    guesses = torch.empty(len(queries), min(GUESSES, n_classes), dtype=torch.int64)
    for start in range(0, len(queries), QUERY_ROWS):
        asked = _unit(queries[start : start + QUERY_ROWS], device)
        near = torch.empty(len(asked), 0, device=device)
        which = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for first in range(0, len(train), TRAIN_ROWS):
            cosines = asked @ _unit(train[first : first + TRAIN_ROWS], device).T
            values, at = cosines.topk(min(k, cosines.shape[1]), dim=1)
            near, order = torch.cat([near, values], dim=1).topk(min(k, near.shape[1] + values.shape[1]), dim=1)
            which = torch.cat([which, at + first], dim=1).gather(1, order)
        guesses[start : start + len(asked)] = _first(_log_votes(near.double() / temperature, labels.to(device)[which], n_classes))
    return guesses


def _log_votes(logs: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """Logarithms of the sums by class, [m, n_classes], of votes whose logarithms are `logs` [m, k]; votes themselves leave the
    range of numbers at small temperatures."""
    largest = torch.full((len(logs), n_classes), -torch.inf, dtype=logs.dtype, device=logs.device)
    largest.scatter_reduce_(1, classes, logs, "amax")
    sums = torch.zeros_like(largest).scatter_add_(1, classes, (logs - largest.gather(1, classes)).exp())
    return largest + sums.log()  # without a vote: minus infinity


def _unit(vectors: Tensor, device: str) -> Tensor:
    return F.normalize(vectors.to(device).float(), dim=1)


def _first(scores: Tensor) -> Tensor:
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :GUESSES].cpu()


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """Multinomial logistic regression on standardised vectors."""

    mean: Tensor
    "[C]"
    std: Tensor
    "[C]; 1 where all training vectors are equal"
    weight: Tensor
    "[n_classes, C], of standardised vectors"
    bias: Tensor
    iterations: int
    converged: bool

    @classmethod
    def fit(cls, train: Tensor, labels: Tensor, n_classes: int, l2: float, *, device: str = "cpu") -> "LinearClassifier":
        """The minimum over `train` [n, C] of the mean cross-entropy plus l2 / 2 * |weight|^2, from zero, by L-BFGS.

        scikit-learn's `LogisticRegression(C=1 / (n * l2))` is the same. The sums go over chunks of rows, in their order.
        """
        mean, std = _moments(train, device)
        weight = torch.zeros(n_classes, train.shape[1], device=device, requires_grad=True)
        bias = torch.zeros(n_classes, device=device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=1e-5,
            tolerance_change=1e-9,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = 0.5 * l2 * weight.square().sum()
            total.backward()
            total = total.detach()
            for vectors, targets in _chunks(train, labels, device):
                logits = F.linear((vectors - mean) / std, weight, bias)
                part = F.cross_entropy(logits, targets, reduction="sum") / len(train)
                part.backward()
                total = total + part.detach()
            return total

        optimizer.step(loss)
        iterations = int(optimizer.state[weight]["n_iter"])
        return cls(
            mean=mean,
            std=std,
            weight=weight.detach(),
            bias=bias.detach(),
            iterations=iterations,
            converged=iterations < MAX_ITERATIONS,
        )

    def guesses(self, vectors: Tensor) -> Tensor:
        """The likeliest classes of `vectors` [m, C], int64 [m, up to 5]."""
        device = self.weight.device
        found = []
        for start in range(0, len(vectors), FIT_ROWS):
            some = vectors[start : start + FIT_ROWS].to(device).float()
            found.append(_first(F.linear((some - self.mean) / self.std, self.weight, self.bias)))
        return torch.cat(found) if found else torch.empty(0, min(GUESSES, len(self.bias)), dtype=torch.int64)


def _chunks(train: Tensor, labels: Tensor, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(train), FIT_ROWS):
        stop = start + FIT_ROWS
        yield train[start:stop].to(device).float(), labels[start:stop].to(device)


def _moments(train: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] over all rows."""
    n = len(train)
    parts = [train[start : start + FIT_ROWS] for start in range(0, n, FIT_ROWS)]
    mean = sum((part.to(device).double().sum(dim=0) for part in parts), torch.zeros(())) / n
    squares = sum(((part.to(device).double() - mean).square().sum(dim=0) for part in parts), torch.zeros(()))
    std = (squares / n).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()
