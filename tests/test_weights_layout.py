"""Rows behind a flattened image when the net is more than a chain: heads, residual blocks, branches, shared layers."""

import jax
import numpy as np
import pytest

import fnn

RNG = np.random.default_rng(0)
OWN = {"bias": False}


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def loaded(behind, entries, x=None, **options):
    """Load a convolution, `flatten` and what is behind it."""
    net = fnn.serial(fnn.conv(4, 1, **OWN), fnn.flatten(), *behind)
    x = drawn(2, 3, 3, 2) if x is None else x
    first = drawn(4, 2, 1, 1)
    params, state, _ = fnn.weights.from_torch({"c.weight": first} | entries, net, x, **options)
    flat = np.einsum("nhwc,oc->nohw", x, first[:, :, 0, 0]).reshape(len(x), -1)  # channels first
    again = fnn.weights.to_torch(params, state, like={"c.weight": first} | entries, **options)
    assert all(np.array_equal(again[name], a) for name, a in entries.items())
    return net.apply(params, state, x)[0], flat


def normed(flat):
    return (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("names", [False, True])
def test_each_head_gets_the_image(norm, names):
    def head(n):
        return fnn.serial(fnn.layer_norm(eps=1e-5), fnn.dense(n, **OWN)) if norm else fnn.dense(n, **OWN)

    heads = fnn.parallel({"a": head(5), "b": head(6)}) if names else fnn.parallel(head(5), head(6))
    entries, scales = {}, {}
    for name, n in (("a", 5), ("b", 6)):
        scales[name] = drawn(2, 36)
        if norm:
            entries |= {f"n{name}.weight": scales[name][0], f"n{name}.bias": scales[name][1]}
        entries[f"{name}.weight"] = drawn(n, 36)
    y, flat = loaded([heads], entries)
    for name, got in y.items() if names else zip("ab", y, strict=True):
        given = normed(flat) * scales[name][0] + scales[name][1] if norm else flat
        np.testing.assert_allclose(got, given @ entries[f"{name}.weight"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "who, behind, units",
    [
        ("3", [fnn.residual(fnn.serial(fnn.dense(7, **OWN), fnn.dense(36, **OWN))), fnn.dense(5, **OWN)], (7, 36, 5)),
        ("3", [fnn.residual(fnn.dense(36, **OWN)), fnn.dense(5, **OWN)], (36, 5)),
        ("3", [fnn.dense(36, **OWN), fnn.dense(5, **OWN)], (36, 5)),
        ("2/1", [fnn.parallel(fnn.dense(36, **OWN), fnn.dense(5, **OWN))], (36, 5)),
        (r"2/\[1\]", [fnn.repeat(fnn.dense(36, **OWN), 2)], (36, 36)),
        ("4", [fnn.parallel(fnn.serial(), fnn.dense(36, **OWN)), fnn.sum_inputs(), fnn.dense(5, **OWN)], (36, 5)),
    ],
)
def test_what_the_tree_does_not_say_is_asked(who, behind, units):
    entries, inputs = {}, 36
    for i, n in enumerate(units):
        entries[f"{i}.weight"] = drawn(n, 36 if n == 5 else inputs)
        inputs = n
    with pytest.raises(ValueError, match=rf"inputs must be known behind a convolution, got {who} with kernel \[36, "):
        loaded(behind, entries)


def test_the_answer_is_taken():
    entries = {"a.weight": drawn(36, 36), "b.weight": drawn(5, 36)}
    y, flat = loaded([fnn.dense(36, **OWN), fnn.dense(5, **OWN)], entries, flattened={"3": None})
    np.testing.assert_allclose(y, flat @ entries["a.weight"].T @ entries["b.weight"].T, rtol=1e-4, atol=1e-3)
    heads = fnn.parallel(fnn.dense(36, **OWN), fnn.dense(5, **OWN))
    y, flat = loaded([heads], entries, flattened={"2/1": (3, 3, 4)})
    np.testing.assert_allclose(y[1], flat @ entries["b.weight"].T, rtol=1e-4, atol=1e-4)


def test_branches_shared_layers_and_images_reshaped_by_hand_are_asked():
    x, extra = drawn(2, 3, 3, 2), drawn(2, 3)
    image = fnn.serial(fnn.conv(4, 1, **OWN), fnn.flatten())
    both = fnn.branches({"image": image, "more": fnn.dense(6, **OWN)})
    shared = fnn.shared(fnn.dense(5, **OWN), lambda use: fnn.serial(image, use()))
    reshaped = fnn.activation(lambda x: x.reshape(len(x), -1))
    mapped = fnn.serial(fnn.conv(4, 1, **OWN), fnn.dense(3, **OWN), reshaped, fnn.dense(5, **OWN))
    for who, net, spec, shapes in (
        ("2", fnn.serial(both, fnn.concatenate(), fnn.dense(5, **OWN)), {"image": x, "more": extra}, [(6, 3), (5, 42)]),
        ("shared", shared, x, [(5, 36)]),
        ("3", mapped, x, [(3, 4), (5, 27)]),
    ):
        entries = {"c.weight": drawn(4, 2, 1, 1)} | {f"{i}.weight": drawn(*shape) for i, shape in enumerate(shapes)}
        with pytest.raises(ValueError, match=rf"must be known behind a convolution, got {who} with kernel"):
            fnn.weights.from_torch(entries, net, spec)


@pytest.mark.parametrize(
    "net",
    [
        fnn.serial(fnn.conv(4, 1), fnn.flatten(), fnn.serial(fnn.dense(8), fnn.serial(fnn.dense(8)), fnn.dense(3))),
        fnn.serial(fnn.serial(fnn.conv(4, 1), fnn.conv(4, 1)), fnn.global_avg_pool(), fnn.dense(4), fnn.dense(2)),
        fnn.serial(fnn.conv(4, 1), fnn.global_avg_pool(), fnn.repeat(fnn.residual(fnn.dense(4)), 2), fnn.dense(2)),
        fnn.models.resnet((1, 1), 3),
        fnn.models.convnet((4, 4), 3),
    ],
)
def test_usual_nets_need_no_question(net):
    like = jax.eval_shape(net.init, jax.random.key(0), np.ones((2, 32, 32, 3), np.float32))
    params, state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like)
    assert fnn.weights.to_torch(params, state)
