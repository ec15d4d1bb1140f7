"""Synthetic data: clusters, spirals, teachers and sums against closed forms."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from test_data import KEY, same, says

from fnn.datasets import data, synthetic


def upper_tail(z):
    return math.erfc(z / math.sqrt(2)) / 2


def centroids(d):
    return np.stack([np.asarray(d.x)[np.asarray(d.y) == c].mean(0) for c in range(int(d.y.max()) + 1)])


@pytest.mark.parametrize("classes, features", [(2, 2), (5, 7)])
def test_clusters_stand_four_apart_on_a_circle(classes, features):
    # Means of 200 examples with spread 0.01 are off by 0.0007 (sd) per axis; 0.005 is 7 sd: p < 1e-9.
    train, _ = data.clusters(key=KEY, classes=classes, features=features, examples=250 * classes, spread=0.01)
    centres = centroids(train)
    np.testing.assert_allclose(np.linalg.norm(centres - np.roll(centres, 1, 0), axis=1), 4, atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 2 / math.sin(math.pi / classes), atol=0.01)
    residual = np.asarray(train.x) - centres[np.asarray(train.y)]
    # n = 200 * classes * features >= 800 values: relative sd of the std at most 1/sqrt(2 * 800) = 2.5 %; 15 % is 6 sd.
    np.testing.assert_allclose(residual.std(), 0.01, rtol=0.15)


def test_nearest_centroid_reaches_the_known_error_of_two_clusters():
    # n = 20000, error Q(2) = 0.02275, sd 0.00106; 0.0055 is 5.2 sd: p < 3e-7. The estimated centres cost about 1e-5.
    train, test = data.clusters(key=KEY, classes=2, features=3, examples=40000, test=0.5)
    distance = np.linalg.norm(np.asarray(test.x)[:, None] - centroids(train), axis=-1)
    error = np.mean(distance.argmin(1) != np.asarray(test.y))
    assert abs(error - upper_tail(2.0)) < 0.0055


@pytest.mark.parametrize("classes, turns", [(2, 1.5), (3, 0.5), (1, 2.0)])
def test_spirals_without_noise_lie_on_their_arms(classes, turns):
    train, test = data.spirals(key=KEY, classes=classes, turns=turns, noise=0.0, examples=500)
    x, y = (np.concatenate([a, b]) for a, b in zip(train, test, strict=True))
    r = np.linalg.norm(x, axis=1)
    off = np.arctan2(x[:, 1], x[:, 0]) - 2 * np.pi * (r + y) / classes
    np.testing.assert_allclose(r * np.exp(1j * off), r, atol=1e-5)  # equal modulo whole turns
    # The square of r/(turns*classes) is uniform: its mean of 500 is 1/2 with sd 0.013; 0.07 is 5.4 sd, p < 1e-7.
    assert abs(np.mean((r / (turns * classes)) ** 2) - 0.5) < 0.07 and r.max() <= turns * classes * (1 + 1e-6)
    np.testing.assert_allclose(np.bincount(y), 500 / classes, atol=1)


def noise_of(loader, field, **options):
    quiet, loud = (loader(key=KEY, noise=s, examples=5000, **options) for s in (0.0, 0.3))
    other = "y" if field == "x" else "x"
    assert same([getattr(d, other) for d in quiet], [getattr(d, other) for d in loud])
    return np.concatenate([getattr(b, field) - getattr(a, field) for a, b in zip(quiet, loud, strict=True)])


@pytest.mark.parametrize("loader, field, options", [(data.spirals, "x", {}), (data.teacher, "y", {"outputs": 2})])
def test_noise_has_its_standard_deviation(loader, field, options):
    # n = 10000 normal values: the std has relative sd 1/sqrt(2n) = 0.7 %, the mean sd 0.003; 5 sd each, p < 2e-6.
    noise = noise_of(loader, field, **options)
    assert noise.size == 10000
    assert abs(noise.std() / 0.3 - 1) < 0.036 and abs(noise.mean()) < 0.015


def test_teacher_of_width_one_is_one_tanh():
    train, test = data.teacher(key=KEY, features=3, width=1, examples=200)
    x, y = np.asarray(train.x, np.float64), np.asarray(train.y, np.float64)[:, 0]

    grid = abs(y).max() * (1 + np.geomspace(1e-4, 10, 1000))
    # If y = v tanh(x w) for one of these v, then arctanh(y / v) is linear in x, without an intercept.
    w = np.linalg.lstsq(x, np.arctanh(y[:, None] / grid), rcond=None)[0]
    best = np.argmin(np.std(grid * np.tanh(x @ w) - y[:, None], axis=0))
    error = grid[best] * np.tanh(np.asarray(test.x) @ w[:, best]) - np.asarray(test.y)[:, 0]
    line = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.std(error) < 5e-3 * np.std(y) and np.std(x @ line - y) > 5e-2 * np.std(y)


def test_teacher_moments():
    # x: 400000 standard normals, std within 1 % (9 sd). Mean square of y: E tanh(N(0,1))^2 = 0.394, up to the draw of W
    # and V (relative sd about 9 % per output at 200 features, so 1.3 % for 50 outputs) and of x; 10 % is over 5 sd.
    train, _ = data.teacher(key=KEY, features=200, width=400, outputs=50, examples=2500)
    assert train.x.shape == (2000, 200) and train.y.shape == (2000, 50) and train.y.dtype == jnp.float32
    assert abs(np.std(train.x) - 1) < 0.01
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    expected = np.sum(weights * np.tanh(nodes) ** 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(np.mean(np.square(train.y)), expected, rtol=0.1)


def test_adding_marks_one_number_in_each_half():
    train, test = data.adding(key=KEY, examples=4000, length=11, test=0.25)
    assert train.x.shape == (3000, 11, 2) and test.y.shape == (1000, 1)
    x, y = np.asarray(train.x), np.asarray(train.y)
    np.testing.assert_array_equal(x[:, :5, 1].sum(1), 1)
    np.testing.assert_array_equal(x[:, 5:, 1].sum(1), 1)
    np.testing.assert_allclose((x[..., 0] * x[..., 1]).sum(1), y[:, 0], rtol=1e-6)
    # Var = 1/6; its standard error is 1/6·sqrt((kurtosis - 1)/n) = 0.0036, kurtosis 2.4: six of them, 2e-9 by chance.
    assert np.var(y) == pytest.approx(1 / 6, abs=0.022)
    assert (x[:, :, 1].sum(0) > 0).all()
    with says(ValueError, "data.adding: length must be at least 2, one marked number in each half, got 1"):
        data.adding(key=KEY, length=1)


def test_numbers_are_spelled_and_told_apart():
    spelled = {n: " ".join(synthetic.spell(n)) for n in (0, 7, 13, 20, 42, 100, 310, 999, 1000, 2017, 8040, 9999)}
    assert spelled == {
        0: "zero",
        7: "seven",
        13: "thirteen",
        20: "twenty",
        42: "forty two",
        100: "one hundred",
        310: "three hundred ten",
        999: "nine hundred ninety nine",
        1000: "one thousand",
        2017: "two thousand seventeen",
        8040: "eight thousand forty",
        9999: "nine thousand nine hundred ninety nine",
    }
    assert len({" ".join(synthetic.spell(n)) for n in range(10_000)}) == 10_000
    with says(ValueError, "spell: the number must lie in 0..9999, got 10000"):
        synthetic.spell(10_000)


def test_number_words_hold_questions_answers_and_unseen_numbers():
    train, test = data.number_words(key=KEY)
    assert train.x.shape == train.y.shape == (16_000, 13) and test.size == 4000
    text, parts = synthetic.NUMBER_TOKENS, []
    for part in (train, test):
        x, y = np.asarray(part.x), np.asarray(part.y)
        np.testing.assert_array_equal(y[:, : synthetic.PROMPT - 1], -1)
        # Each target is the token that follows, up to <end>; nothing behind it is asked for.
        np.testing.assert_array_equal(np.where(y[:, :-1] >= 0, y[:, :-1], 0)[:, 6:], x[:, 7:])
        numbers = set()
        for row, targets in zip(x, y, strict=True):
            source = [text[t] for t in row[:6] if t != synthetic.PAD]
            answer = [text[t] for t in targets if t >= 0]
            assert answer.pop() == "<end>"
            figures, words = (answer, source) if text[row[6]] == "<to figures>" else (source, answer)
            assert synthetic.spell(int("".join(figures))) == words
            numbers.add(int("".join(figures)))
        assert len(numbers) == part.size // 2
        parts.append(numbers)
    assert parts[0] | parts[1] == set(range(10_000)) and not parts[0] & parts[1]
