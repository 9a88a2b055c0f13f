"""Nearest neighbours and logistic regression, held against NumPy and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from operators import classifiers
from operators.classifiers import LinearClassifier, knn_votes


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """So that all rows are several chunks."""
    for name in ("QUERY_ROWS", "TRAIN_ROWS", "FIT_ROWS"):
        monkeypatch.setattr(classifiers, name, 17)


def made_up(seed: int = 0, n_classes: int = 7, rows: int = 150, channels: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around their classes' centres, with means and scales of their own for each channel."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(n_classes, channels))
    labels = rng.integers(0, n_classes, rows)
    vectors = centres[labels] + rng.normal(size=(rows, channels))
    return (vectors * np.linspace(0.1, 30, channels) + np.linspace(-5, 50, channels)).astype(np.float32), labels


def brute_force(train: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Log-sums of the votes, float64 [m, classes]."""
    unit = [each.astype(np.float64) / np.linalg.norm(each.astype(np.float64), axis=1, keepdims=True) for each in (train, queries)]
    cosines = unit[1] @ unit[0].T
    logs = np.full((len(queries), labels.max() + 1), -np.inf)
    for i, row in enumerate(cosines):
        nearest = np.argsort(-row, kind="stable")[:k]
        for label in set(labels[nearest]):
            logs[i, label] = logsumexp(row[nearest][labels[nearest] == label] / temperature)
    return logs


@pytest.mark.parametrize("k", [1, 5, 20, 40, 10_000])
@pytest.mark.parametrize("temperature", [0.07, 1e-4, 10.0])
def test_votes_are_those_of_brute_force(k, temperature):
    (train, labels), (queries, _) = made_up(), made_up(1, rows=60)

    guesses = knn_votes(torch.tensor(train), torch.tensor(labels), torch.tensor(queries), 7, k, temperature).numpy()

    logs = brute_force(train, labels, queries, k, temperature)
    assert guesses.shape == (60, 5)
    # What is guessed has the sums in order, up to float32's cosines; classes without votes are equal.
    found, best = np.take_along_axis(logs, guesses, axis=1), -np.sort(-logs, axis=1)[:, :5]
    np.testing.assert_array_equal(np.isinf(found), np.isinf(best))
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-5 / temperature)


def test_equal_votes_go_to_the_lower_class():
    train = torch.tensor([[1.0, 0], [1, 0], [0, 1]])

    guesses = knn_votes(train, torch.tensor([2, 1, 0]), torch.tensor([[5.0, 0]]), 3, 2, 0.07)

    assert guesses.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_probe_is_scikit_learns_logistic_regression(l2, dtype):
    (train, labels), (queries, _) = made_up(), made_up(1, rows=60)
    train, queries = (torch.tensor(each).to(dtype) for each in (train, queries))

    fitted = LinearClassifier.fit(train, torch.tensor(labels), 7, l2)

    vectors = train.double().numpy()
    mean, std = vectors.mean(axis=0), vectors.std(axis=0)
    expected = LogisticRegression(C=1 / (len(train) * l2), tol=1e-8, max_iter=10_000).fit((vectors - mean) / std, labels)
    assert fitted.converged
    np.testing.assert_allclose(fitted.weight, expected.coef_, atol=5e-3)
    ours = fitted.guesses(queries)[:, 0].numpy()
    assert (ours == expected.predict((queries.double().numpy() - mean) / std)).mean() >= 59 / 60


def test_channel_that_never_changes_is_no_matter():
    train, labels = made_up()
    train[:, 3] = 4.0

    fitted = LinearClassifier.fit(torch.tensor(train), torch.tensor(labels), 7, 1e-2)

    assert fitted.weight.isfinite().all()
    assert fitted.weight[:, 3].abs().max() < 1e-6
    assert (fitted.guesses(torch.tensor(train))[:, 0].numpy() == labels).mean() > 0.9


def test_two_classes_have_two_guesses():
    train, labels = made_up(n_classes=2)

    guesses = LinearClassifier.fit(torch.tensor(train), torch.tensor(labels), 2, 1e-2).guesses(torch.tensor(train))

    assert guesses.shape == (150, 2)
    assert (guesses.sum(dim=1) == 1).all()
