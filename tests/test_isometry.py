"""Moments of the singular values of wide nets: closed forms, and matrices drawn with NumPy."""

import itertools
import math

import numpy as np
import pytest

from fnn import meanfield

PHIS = {
    "identity": (lambda h: h, np.ones_like),
    "relu": (lambda h: np.maximum(h, 0), lambda h: (h > 0) * 1.0),
    "tanh": (np.tanh, lambda h: 1 - np.tanh(h) ** 2),
}


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_linear_and_relu_nets_in_closed_form(depth):
    sizes = [64] * (depth + 1)
    assert meanfield.singular_moments("identity", sizes) == pytest.approx((1, depth + 1))
    assert meanfield.singular_moments("identity", sizes, orthogonal=True) == pytest.approx((1, 1))
    assert meanfield.singular_moments("identity", sizes, sigma_w=3.0, orthogonal=True) == pytest.approx(
        (9**depth, 81**depth)
    )
    # ReLU: E[phi'²] = E[phi'⁴] = 1/2, so that each of the depth - 1 activations adds 1, and each normal matrix 1.
    he = meanfield.singular_moments("relu", sizes, sigma_w=math.sqrt(2))
    assert he.first == pytest.approx(2) and 1 / he.isometry == pytest.approx(2 * depth)
    orthogonal = meanfield.singular_moments("relu", sizes, sigma_w=math.sqrt(2), orthogonal=True)
    assert 1 / orthogonal.isometry == pytest.approx(depth)


def test_at_the_fixed_point_the_spread_grows_linearly_with_depth():
    sigma_w, sigma_b = math.sqrt(1.76095464), math.sqrt(0.05)
    q = (meanfield.fixed_point("tanh", sigma_w, sigma_b).q - sigma_b**2) / sigma_w**2
    given = {"sigma_w": sigma_w, "sigma_b": sigma_b, "q": q}
    spread = [1 / meanfield.singular_moments("tanh", [50] * n, **given).isometry - 1 for n in (10, 20, 30)]
    assert spread[2] - spread[1] == pytest.approx(spread[1] - spread[0], rel=1e-5)
    # chi = 1: the first moment stands still.
    first = [meanfield.singular_moments("tanh", [50] * n, **given).first for n in (10, 30)]
    assert first[0] == pytest.approx(first[1], rel=1e-5) and first[0] == pytest.approx(sigma_w**2, rel=1e-5)


@pytest.mark.parametrize("name", list(PHIS))
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("sizes", [(80, 120, 60, 40), (40, 120, 120, 120)])
def test_moments_are_those_of_drawn_nets(name, orthogonal, sizes):
    rng = np.random.default_rng(3)
    phi, slope = PHIS[name]
    found = []
    for _ in range(30):
        x = rng.normal(size=sizes[0])
        x *= math.sqrt(0.7 * x.size) / np.linalg.norm(x)
        j, h = np.eye(x.size), x
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            if i:
                j, h = slope(h)[:, None] * j, phi(h)
            w = rng.normal(size=(n_out, n_in))
            if orthogonal:
                u, _, v = np.linalg.svd(w, full_matrices=False)
                w = 1.3 * u @ v
            else:
                w *= 1.3 / math.sqrt(n_in)
            j, h = w @ j, w @ h + 0.2 * rng.normal(size=n_out)
        s = np.linalg.svd(j, compute_uv=False)
        found.append((np.mean(s**2), np.mean(s**4)))
    predicted = meanfield.singular_moments(name, sizes, sigma_w=1.3, sigma_b=0.2, q=0.7, orthogonal=orthogonal)
    error = np.std(found, axis=0) / math.sqrt(len(found))
    finite = np.array([0, 5 / min(sizes)]) * predicted  # the second moment has a correction of order 1/width
    assert np.all(np.abs(np.mean(found, axis=0) - predicted) < 4 * error + finite + 1e-9)


def test_errors():
    with pytest.raises(ValueError, match="sizes must be at least"):
        meanfield.singular_moments("tanh", [3])
    with pytest.raises(ValueError, match="elementwise"):
        meanfield.singular_moments("softmax", [3, 3])
