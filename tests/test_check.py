"""Validators: the rule, what it got, the right exception, and traced values that pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnn import check


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(1)])
def test_positive_accepts(value):
    check.positive("dense", width=value)


@pytest.mark.parametrize(
    "value, kind", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("4", TypeError)]
)
def test_positive_refuses(value, kind):
    with pytest.raises(kind) as error:
        check.positive("dense", width=value)
    assert str(error.value) == f"dense: width must be a positive integer, got {value!r}"


def test_every_value_is_checked_under_its_own_name():
    with pytest.raises(ValueError, match="conv: stride must be"):
        check.positive("conv", width=3, stride=0)


@pytest.mark.parametrize(
    "value, kind", [(-1, ValueError), (1.5, TypeError), (False, TypeError), (None, TypeError), (0, None), (5, None)]
)
def test_non_negative(value, kind):
    if kind is None:
        return check.non_negative("mlp", depth=value)
    with pytest.raises(kind) as error:
        check.non_negative("mlp", depth=value)
    assert str(error.value) == f"mlp: depth must be an integer of at least 0, got {value!r}"


@pytest.mark.parametrize(
    "value, kind",
    [
        *((good, None) for good in (0, 0.0, 0.999, np.float32(0.5), np.array(0.25))),
        *((bad, ValueError) for bad in (1, 1.0, -0.1, math.nan, math.inf, np.array(1.5), np.array([0.1, 0.2]))),
        *((bad, TypeError) for bad in (True, "0.5", None)),
    ],
)
def test_fraction(value, kind):
    if kind is None:
        return check.fraction("dropout", rate=value)
    with pytest.raises(kind) as error:
        check.fraction("dropout", rate=value)
    assert str(error.value) == f"dropout: rate must lie in [0, 1), got {value!r}"


@pytest.mark.parametrize(
    "value, kind",
    [
        *((good, None) for good in (1e-30, 1, 1e30, np.float32(0.5), np.array(2))),
        *((bad, ValueError) for bad in (0, 0.0, -1.0, math.nan, math.inf, np.array(0.0), np.ones(2))),
        *((bad, TypeError) for bad in (True, "1", None)),
    ],
)
def test_above_zero(value, kind):
    if kind is None:
        return check.above_zero("clip.by_value", limit=value)
    with pytest.raises(kind) as error:
        check.above_zero("clip.by_value", limit=value)
    assert str(error.value) == f"clip.by_value: limit must be a finite number above 0, got {value!r}"


def test_jax_scalars_are_numbers():
    check.above_zero("f", eps=jnp.float32(0.5))
    check.fraction("f", rate=jnp.float32(0.5))
    with pytest.raises(ValueError, match="f: eps must be a finite number above 0"):
        check.above_zero("f", eps=jnp.float32(-0.5))
    with pytest.raises(ValueError, match="f: rate must lie in"):
        check.fraction("f", rate=jnp.float32(1.0))


def test_traced_scalars_pass_and_traced_vectors_do_not():
    seen = []

    @jax.jit
    def inside(value):
        check.above_zero("f", eps=value)
        check.fraction("f", rate=value)
        with pytest.raises(ValueError, match="f: eps must be"):
            check.above_zero("f", eps=jnp.stack([value, value]))
        seen.append(True)
        return value

    assert inside(-3.0) == -3.0 and jax.vmap(inside)(jnp.ones(2)).shape == (2,) and seen


@pytest.mark.parametrize(
    "value, message",
    [
        ("meam", "fit: unknown mode 'meam'; did you mean 'mean'?"),
        ("MEAN", "fit: unknown mode 'MEAN'; choose one of mean, sum, none"),
        (3, "fit: unknown mode 3; choose one of mean, sum, none"),
        (None, "fit: unknown mode None; did you mean"),
    ],
)
def test_choice(value, message):
    check.choice("fit", ("mean", "sum", "none"), mode="sum")
    with pytest.raises(ValueError) as error:
        check.choice("fit", (name for name in ("mean", "sum", "none")), mode=value)
    assert str(error.value).startswith(message)


def test_describe():
    assert check.describe(np.zeros((64, 10), np.float32)) == "float32[64,10]"
    assert check.describe(jax.ShapeDtypeStruct((), jnp.bfloat16)) == "bfloat16[]"
    assert check.describe(np.int32(3)) == "int32[]"
    assert check.describe((np.zeros(2), [1.5], {"a": jnp.zeros((1, 2), jnp.int32)})) == (
        "(float64[2], [float], {a: int32[1,2]})"
    )
    assert jax.jit(lambda x: check.describe(x) == "float32[3]")(jnp.zeros(3))
