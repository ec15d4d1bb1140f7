"""How held-out inputs differ from training inputs, and whether chance explains it."""

import numpy as np

from fnn.diagnosis.case import Case
from fnn.diagnosis.causes import Evidence

MOST = 1000
"""So many examples are enough for quantiles and neighbours."""
CHANCE = 0.003
"""How often each of the three comparisons may fire where both parts are drawn alike."""


def flat(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(len(x), -1)


def sampled(x: np.ndarray) -> np.ndarray:
    """Take examples at equal distances, no more than quantiles need."""
    return x[:: max(1, len(x) // MOST)]


def split_symptoms(case: Case) -> list[Evidence]:
    """Held-out inputs with another mean or scale than the training inputs, as a whole or in one feature.

    A difference counts if it is large, and if chance explains it in less than `CHANCE` of all ways to split the rows.
    """
    if case.x is None:
        return []
    x, held = flat(case.x), flat(np.concatenate([case.chooses.x, case.checks.x]))
    if not np.isfinite(x).all():
        return []
    if (bad := np.mean(~np.isfinite(held))) > 0:
        text = f"{bad:.2%} of the held-out inputs are NaN or infinite, none of the training inputs"
        return [Evidence("split_mismatch", text)]
    std = x.std(0)
    live = std > 1e-6 * max(float(std.max()), 1e-30)
    if not live.any():
        return []
    off = float(np.median(np.abs(held.mean(0) - x.mean(0))[live] / std[live]))
    ratio = float(np.median(held.std(0)[live] / std[live]))
    worst = max(off, max(ratio, 1 / max(ratio, 1e-9)) - 1)
    away = np.where(live, 0, np.median(np.abs(held - x.mean(0)), axis=0) / float(np.median(std[live])))
    span, usual = (np.subtract(*np.percentile(sampled(part), (75, 25), axis=0)) for part in (held, x))
    wider = np.where(usual > 0, span / np.where(usual > 0, usual, 1), 0)  # rare values do not count
    if worst <= 1 and away.max() <= 0.5 and wider.max() <= 5:
        return []
    by_chance = alike(sampled(x), sampled(held))
    clear = by_chance < CHANCE / x.shape[1]
    # Half of all features below p, however they depend on each other: in at most 2 p of all cases.
    if worst > 1 and np.median(by_chance[live]) < CHANCE / 2:
        text = f"held-out features lie {off:.3g} training stds off, their std is {ratio:.3g} times that of the training data"
        return [Evidence("split_mismatch", text + " (healthy: below 1, and 0.5 to 2)")]
    if (most := away[clear].max(initial=0)) > 0.5:
        text = f"a feature that is the same in all training examples lies {most:.3g} stds of the others off in held-out ones"
        return [Evidence("split_mismatch", text)]
    if (most := wider[clear].max(initial=0)) > 5:
        text = f"half of the values of a held-out feature span {most:.3g} times what they do in the training data"
        return [Evidence("split_mismatch", text + " (healthy: up to 5)")]
    return []


def alike(x: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Bound, for each feature, the chance that rows drawn alike differ as these do in place or spread: float[features].

    Of all n + m rows K lie beyond a bound that both parts together set. How many of them are among the n rows of x is
    hypergeometric where both are drawn alike, whatever the distribution, ties among them; its tails decide, times their
    number. Bounds are the quartiles of the values, and 0 and the quartiles of those distances from the median that are
    not 0: of a feature that is mostly 0, the sizes of the others.
    """
    both, n = np.concatenate([x, held]), len(x)
    rows, features = both.shape
    values = np.sort(both, axis=0)
    away = np.abs(both - values[(rows - 1) // 2])
    sizes = np.sort(away, axis=0)
    zeros = (sizes == 0).sum(0)
    beyond = [away > 0]
    for share in (0.25, 0.5, 0.75):
        at = np.minimum(zeros + (share * (rows - zeros - 1)).astype(int), rows - 1)
        beyond += [both > values[int(share * (rows - 1))], away > sizes[at, np.arange(features)]]
    tails = []
    for mask in beyond:
        found, among = mask[:n].sum(0), mask.sum(0)
        tails += [_tail(found, n, among, rows), _tail(n - found, n, rows - among, rows)]
    return np.minimum(1, len(tails) * np.min(tails, axis=0))


def _tail(found: np.ndarray, n: int, among: np.ndarray, rows: int) -> np.ndarray:
    """Bound the chance to find so few, or fewer, of `among` rows in n of all `rows`: hypergeometric.

    The terms of the sum fall at least as fast as the first two do, so that a geometric series bounds it.
    """
    from scipy.special import gammaln  # SciPy takes time to import

    def log_choose(a, b):
        return gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)

    others = rows - among
    first = np.exp(log_choose(among, found) + log_choose(others, n - found) - log_choose(rows, n))
    falls = found * (others - n + found) / ((among - found + 1) * (n - found + 1))
    return np.where(falls < 1, first / np.maximum(1 - falls, 1e-9), 1.0)
