"""Synthetic data: tasks whose best possible error is known, and tasks with long dependencies.

Drawn on the host by key; every function returns `(train, test)`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fnn.check import above_zero, at_least_zero, positive
from fnn.datasets.dataset import Dataset, Parts, generator, random_split


def clusters(
    *, key: jax.Array, examples: int = 1000, features: int = 2, classes: int = 3, spread: float = 1.0, test: float = 0.2
) -> Parts:
    """Draw Gaussian clusters, x = centre[y] + spread * N(0, I), with balanced labels.

    `x: float32[n, features], y: int32[n]`. The centres are evenly spaced on a circle in a random plane through 0, at a
    distance of 4 from the next. So the best possible error is known: Q(2/spread) for two classes, and between that and
    twice that for more (2.3 % to 4.6 % at spread 1), with Q the upper tail of the normal distribution.
    """
    who = "data.clusters"
    positive(who, examples=examples, features=features, classes=classes)
    above_zero(who, spread=spread)
    if features < 2 or classes < 2:
        got = f"features={features}, classes={classes}"
        raise ValueError(f"{who}: features and classes must be at least 2, got {got}; ask for more")
    rng = generator(who, key)
    plane = np.linalg.qr(rng.standard_normal((features, 2)))[0]  # an orthonormal pair, uniformly random
    angle = 2 * np.pi * np.arange(classes) / classes
    centres = 2 / np.sin(np.pi / classes) * np.stack([np.cos(angle), np.sin(angle)], -1) @ plane.T
    y = np.arange(examples) % classes
    x = centres[y] + spread * rng.standard_normal((examples, features))
    return random_split(who, x.astype(np.float32), y, rng, test)


def spirals(
    *, key: jax.Array, examples: int = 1000, classes: int = 2, noise: float = 0.1, turns: float = 1.5, test: float = 0.2
) -> Parts:
    """Draw interleaved spirals, x = r (cos a, sin a) + noise * N(0, I), a = 2 pi (r + y) / classes.

    `x: float32[n, 2], y: int32[n]`, labels balanced. Radii reach `turns * classes`, about uniform along the arm. On every
    ray neighbouring arms are 1 apart, so `noise` is in units of that gap. Source: Lang & Witbrock 1988.
    """
    who = "data.spirals"
    positive(who, examples=examples, classes=classes)
    above_zero(who, turns=turns)
    at_least_zero(who, noise=noise)
    rng = generator(who, key)
    y = np.arange(examples) % classes
    # The arc grows as r dr, so that the square root of a uniform number spreads examples evenly along it.
    r = turns * classes * np.sqrt(rng.random(examples))
    a = 2 * np.pi * (r + y) / classes
    x = r[:, None] * np.stack([np.cos(a), np.sin(a)], -1) + noise * rng.standard_normal((examples, 2))
    return random_split(who, x.astype(np.float32), y, rng, test)


def teacher(
    *,
    key: jax.Array,
    examples: int = 1000,
    features: int = 16,
    width: int = 32,
    outputs: int = 1,
    noise: float = 0.0,
    test: float = 0.2,
) -> Parts:
    """Draw a regression task from a random teacher, y = tanh(x W / sqrt(features)) V / sqrt(width) + noise * N(0, I).

    `x: float32[n, features], y: float32[n, outputs]`; x, W and V are standard normal. For one key, x and the teacher's
    part of y do not depend on `noise`. The smallest mean squared error of any student on new data is noise**2. Seven
    arguments, because the task has six numbers. Source: Gardner & Derrida 1989 (the teacher-student setting).
    """
    who = "data.teacher"
    positive(who, examples=examples, features=features, width=width, outputs=outputs)
    at_least_zero(who, noise=noise)
    rng = generator(who, key)
    x, w, v = (rng.standard_normal(shape) for shape in ((examples, features), (features, width), (width, outputs)))
    y = np.tanh(x @ w / math.sqrt(features)) @ v / math.sqrt(width) + noise * rng.standard_normal((examples, outputs))
    return random_split(who, x.astype(np.float32), y.astype(np.float32), rng, test)


def adding(*, key: jax.Array, examples: int = 20_000, length: int = 100, test: float = 0.05) -> Parts:
    """Draw the adding problem: two of `length` numbers are marked, one in each half; the target is their sum.

    `x: float32[n, length, 2]` (uniform numbers in [0, 1], marks 0 or 1), `y: float32[n, 1]`. A net that always answers 1
    has mean squared error 1/6; to do better, it must carry a number over many steps.
    Source: Hochreiter and Schmidhuber 1997, section 5.4; marks as in Arjovsky et al. 2016, section 5.2.
    """
    who = "data.adding"
    positive(who, examples=examples, length=length)
    if length < 2:
        raise ValueError(f"{who}: length must be at least 2, one marked number in each half, got {length}")
    rng = generator(who, key)
    numbers, marks, rows = rng.random((examples, length)), np.zeros((examples, length)), np.arange(examples)
    marks[rows, rng.integers(0, length // 2, examples)] = 1
    marks[rows, rng.integers(length // 2, length, examples)] = 1
    x, y = np.stack([numbers, marks], -1), np.sum(numbers * marks, axis=1, keepdims=True)
    return random_split(who, x.astype(np.float32), y.astype(np.float32), rng, test)


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
    "twenty thirty forty fifty sixty seventy eighty ninety",
)
_ONES, _TENS = (words.split() for words in _WORDS)
PAD, END = 0, 1
NUMBER_TOKENS = ("<pad>", "<end>", "<to figures>", "<to words>", *"0123456789", *_ONES, *_TENS, "hundred", "thousand")
"""The vocabulary of `number_words`; a token's id is its index."""
PROMPT, ANSWER = 7, 7
"""Positions of the two parts of a row of `number_words`: six for the source and one for the direction; six for the answer
and one for `<end>`."""


def spell(number: int) -> list[str]:
    """Spell a number from 0 to 9,999: `spell(1024) == ["one", "thousand", "twenty", "four"]`."""
    if not 0 <= number <= 9999:
        raise ValueError(f"spell: the number must lie in 0..9999, got {number}")
    thousands, rest = divmod(number, 1000)
    hundreds, rest = divmod(rest, 100)
    words = [_ONES[thousands], "thousand"] if thousands else []
    words += [_ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        words += [_TENS[rest // 10 - 2], *([_ONES[rest % 10]] if rest % 10 else [])]
    elif rest or not words:
        words.append(_ONES[rest])
    return words


def number_words(*, key: jax.Array, test: float = 0.2) -> Parts:
    """Make a translation task: the numbers from 0 to 9,999, from words to figures and back.

    A row of 14 tokens is the source padded to six, the direction, the answer, `<end>`, padding. `x: int32[n, 13]` is the
    row without its last token; `y: int32[n, 13]` is the next token at each position of the answer, and -1 elsewhere, which
    `losses.sequence_cross_entropy` skips. The first `PROMPT` tokens of x are the question. The split is by number: both
    directions of a number are in the same part.
    """
    who = "data.number_words"
    token = {text: i for i, text in enumerate(NUMBER_TOKENS)}
    rows = np.zeros((10_000, 2, PROMPT + ANSWER), np.int32)
    for n in range(10_000):
        figures, words = ([token[t] for t in side] for side in (str(n), spell(n)))
        for i, (direction, source, answer) in enumerate(
            (("<to figures>", words, figures), ("<to words>", figures, words))
        ):
            rows[n, i, : len(source)] = source
            rows[n, i, PROMPT - 1] = token[direction]
            rows[n, i, PROMPT : PROMPT + len(answer) + 1] = [*answer, END]
    targets = rows[:, :, 1:].copy()
    targets[:, :, : PROMPT - 1] = -1
    targets[targets == PAD] = -1
    parts = random_split(who, np.arange(10_000), np.zeros(10_000, int), generator(who, key), test)
    train, held_out = (
        Dataset(*(jnp.asarray(a[np.asarray(part.x)].reshape(-1, a.shape[-1])) for a in (rows[:, :, :-1], targets)))
        for part in parts
    )
    return train, held_out
