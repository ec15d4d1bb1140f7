"""What the data sets refuse, each in one sentence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data import KEY, says

from fnn.datasets import data

X, Y = np.ones((6, 2)), np.array([0, 1, 0, 1, 0, 1])
NAN = np.where(np.arange(12).reshape(6, 2) % 7 == 5, np.nan, 1.0)  # in example 2 alone
D = data.Dataset(jnp.asarray(X), jnp.asarray(Y))
REFUSALS = {
    "mismatch": (
        lambda: data.check_dataset("me", X, Y[:5]),
        ValueError,
        "me: x and y must hold the same number of examples, got float64[6,2] and int64[5]",
    ),
    "empty": (
        lambda: data.check_dataset("me", X[:0], Y[:0]),
        ValueError,
        "me: a data set must hold at least one example",
    ),
    "scalar": (
        lambda: data.check_dataset("me", 3.0, Y),
        ValueError,
        "me: x and y must have the examples on their first",
    ),
    "object": (lambda: data.check_dataset("me", X.astype(object), Y), TypeError, "me: x must hold numbers, got object"),
    "nan": (
        lambda: data.check_dataset("me", NAN, Y),
        ValueError,
        "me: x must be finite, got 1 non-finite values, first at example 2; drop or impute them",
    ),
    "inf on device": (
        lambda: data.check_dataset("me", jnp.full((3, 2, 2), jnp.inf, jnp.bfloat16), Y[:3]),
        ValueError,
        "me: x must be finite, got 12 non-finite values, first at example 0; drop or impute them",
    ),
    "nan target": (lambda: data.split(X, NAN, key=KEY), ValueError, "data.split: y must be finite, got 1 non-finite"),
    "overflow": (
        lambda: data.split(X * 1e300, Y, key=KEY),
        ValueError,
        "data.split: x must be finite, got 12 non-finite values, first at example 0",
    ),
    "wrap x": (
        lambda: data.split(np.array([0, 2**40] * 3), Y, key=KEY),
        ValueError,
        "data.split: x must fit in int32, got values from 0 to 1099511627776",
    ),
    "wrap y": (
        lambda: data.split(X, np.array([0, 2**63] * 3, np.uint64), key=KEY),
        ValueError,
        "data.split: y must fit in int32, got values from 0 to 9223372036854775808",
    ),
    "negative": (
        lambda: data.split(X, Y - 1, key=KEY),
        ValueError,
        "data.split: integer labels must be at least 0, got -1",
    ),
    "test 0": (
        lambda: data.split(X, Y, key=KEY, test=0.0),
        ValueError,
        "data.split: test must be a finite number above 0",
    ),
    "test 1": (lambda: data.digits(key=KEY, test=1.0), ValueError, "data.digits: test must lie in [0, 1), got 1.0"),
    "test text": (lambda: data.clusters(key=KEY, test="a"), TypeError, "data.clusters: test must be a finite number"),
    "one example": (
        lambda: data.split(X[:1], X[:1], key=KEY),
        ValueError,
        "data.split: a split must leave an example in both parts, got 1 example",
    ),
    "rare class": (
        lambda: data.split(X, np.array([0, 0, 0, 7, 1, 1]), key=KEY),
        ValueError,
        "data.split: stratify needs at least 2 examples of every class, got class 7 with 1; or pass stratify=False",
    ),
    "key": (
        lambda: data.digits(key=0),
        TypeError,
        "data.digits: key must be one PRNG key, got 0; pass jax.random.key(0)",
    ),
    "keys": (
        lambda: data.clusters(key=jax.random.split(KEY, 3)),
        TypeError,
        "data.clusters: key must be one PRNG key, got key<fry>[3]",
    ),
    "no key": (lambda: data.batches(D, 2, key=None), TypeError, "data.batches: key must be one PRNG key, got None"),
    "features": (
        lambda: data.standardize(D, data.Dataset(D.x[:, :1], D.y)),
        ValueError,
        "data.standardize: all parts must have the features of the training part, got float32[6,2] and float32[6,1]",
    ),
    "nan part": (
        lambda: data.standardize(D, data.Dataset(jnp.asarray(NAN), D.y)),
        ValueError,
        "data.standardize: x must be finite, got 1 non-finite values, first at example 2",
    ),
    "eps": (
        lambda: data.standardize(D, eps=-1.0),
        ValueError,
        "data.standardize: eps must be finite and at least 0, got -1.0",
    ),
    "classes": (
        lambda: data.clusters(key=KEY, classes=1),
        ValueError,
        "data.clusters: features and classes must be at least 2, got features=2, classes=1",
    ),
    "few": (
        lambda: data.clusters(key=KEY, examples=4),
        ValueError,
        "data.clusters: stratify needs at least 2 examples of",
    ),
    "spread": (
        lambda: data.clusters(key=KEY, spread=0),
        ValueError,
        "data.clusters: spread must be a finite number above",
    ),
    "turns": (
        lambda: data.spirals(key=KEY, turns=-1),
        ValueError,
        "data.spirals: turns must be a finite number above 0",
    ),
    "noise": (
        lambda: data.spirals(key=KEY, noise=math.nan),
        ValueError,
        "data.spirals: noise must be finite and at least 0, got nan",
    ),
    "width": (
        lambda: data.teacher(key=KEY, width=0),
        ValueError,
        "data.teacher: width must be a positive integer, got 0",
    ),
    "batch": (
        lambda: data.batches(D, 7, key=KEY),
        ValueError,
        "data.batches: batch_size must not exceed the 6 examples, got 7; make it smaller",
    ),
    "batch 0": (lambda: data.batches(D, 0, key=KEY), ValueError, "data.batches: batch_size must be a positive integer"),
    "epochs": (lambda: data.batches(D, 2, key=KEY, epochs=0), ValueError, "data.batches: epochs must be a positive"),
    "pair": (
        lambda: data.batches((X, Y[:3]), 2, key=KEY),
        ValueError,
        "data.batches: x and y must hold the same number",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    call, kind, text = REFUSALS[name]
    with says(kind, text) as info:
        call()
    assert "\n" not in str(info.value)
