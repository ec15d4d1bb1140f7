"""Arrays as rows of few matrices: norms and products by row are those of each array, by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from fnn import lowering, tree
from fnn.rows import PADDED, Rows


def made(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 8), "bias": (8,), "one": (), "wide": (3, lowering.SMALL)}
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    blocks = {"kernel": rng.normal(size=(5, 8, 8)).astype(dtype), "bias": rng.normal(size=(5, 8)).astype(dtype)}
    return {**arrays, "trunk": tree.Stacked(blocks), "half": rng.normal(size=(4, 8)).astype(np.float16)}


def test_norms_and_products_of_rows_are_those_of_arrays():
    a, b = made(), jax.tree.map(lambda x: 2 * x + 1, made())
    rows = Rows.of(a)
    norms = rows.numbers([tree.length(m, 1) for m in rows.join(a)])
    products = rows.numbers([jnp.sum(m * n, axis=1) for m, n in zip(rows.join(a), rows.join(b), strict=True)])
    assert jax.tree.structure(norms) == jax.tree.structure(a)
    pairs = zip(*(jax.tree.leaves(t) for t in (a, b, norms, products)), strict=True)
    for x, y, norm, product in pairs:
        lead = norm.shape
        half = x.dtype == np.float16  # whose norms are float32
        x, y = (np.asarray(v, np.float64).reshape(*lead, -1) for v in (x, y))
        rtol = 1e-2 if half else 1e-5
        np.testing.assert_allclose(norm, np.linalg.norm(x, axis=-1), rtol=rtol)
        np.testing.assert_allclose(product, (x * y).sum(-1), rtol=10 * rtol)
    assert norms["trunk"].blocks["kernel"].shape == (5,) and norms["a"].shape == ()
    back = rows.numbers(rows.join_numbers(norms))
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(norms), strict=True))


def test_few_matrices_that_mix_no_dtypes_and_pad_no_more_than_they_may():
    a = made()
    rows = Rows.of(a)
    leaves = jax.tree.leaves(a)
    assert len(rows.groups) < len(leaves) and sorted(i for g in rows.groups for i in g) == list(range(len(leaves)))
    for group, matrix in zip(rows.groups, rows.join(a), strict=True):
        widths = [leaves[i].size // max(1, np.prod(rows.kinds[i][0][: rows.kinds[i][1]], dtype=int)) for i in group]
        assert len({leaves[i].dtype for i in group}) == 1 and matrix.shape[1] == max(widths) <= PADDED * min(widths)
        assert len(group) == 1 or max(widths) <= lowering.SMALL  # large arrays are not copied


def test_nothing_in_a_tree_gives_no_matrix():
    assert Rows.of({}).join({}) == [] and Rows.of({}).numbers([]) == {}
