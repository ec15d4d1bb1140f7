"""Every optimiser of optax trains `serial` and `repeat` in `train_step` as it trains a plain tree by hand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_table
import pytest

import fnn
from fnn import admission, optimizers
from fnn.training.extra import offered
from fnn.tree import Stacked

DEPTH, STEPS = 2, 4
NAMES = sorted(optax_table.candidates().keys() - optax_table.LEFT_OUT.keys())
EXTRA = {"optax.lbfgs": ["value", "grad", "value_fn"], "optax.contrib.sam": ["grad_fn"]}
EXTRA |= dict.fromkeys(
    ["optax.scale_by_backtracking_linesearch", "optax.scale_by_zoom_linesearch"], EXTRA["optax.lbfgs"]
)
EXTRA |= {f"optax.contrib.{name}": ["obj_fn"] for name in ("sophia", "hutchinson_estimator_diag_hessian")}
"""What optax's documentation says that these need, which take the loss again; the others get value and grad."""
RANDOM = {"optax.contrib.sophia", "optax.contrib.hutchinson_estimator_diag_hessian"}
"""Those of them that draw random signs for each array."""
IN_NETS = {
    "optax.lbfgs": ["looped"],
    "optax.contrib.sam": ["looped", "written_out"],
    "optax.contrib.sophia": ["looped"],
}
"""Of those that take the loss again, one of each way in which they get it; the others need --slow."""
KINDS = {
    *(
        "MultiSteps",
        "adafactor",
        "adam",
        "adamw",
        "adaptive_grad_clip",
        "add_decayed_weights",
        "add_noise",
        "apply_if_finite",
    ),
    *(
        "clip_by_block_rms",
        "clip_by_global_norm",
        "conditionally_mask",
        "flatten",
        "inject_hyperparams",
        "keep_params_nonnegative",
    ),
    *(
        "lamb",
        "lbfgs",
        "lion",
        "masked",
        "multi_transform",
        "novograd",
        "scale_by_backtracking_linesearch",
        "set_to_zero",
        "sm3",
    ),
    *("snapshot", "stateless", "contrib.cocob", "contrib.dog", "contrib.galore", "contrib.mechanize", "contrib.momo"),
    *("contrib.muon", "contrib.prodigy", "contrib.sam", "contrib.schedule_free_adamw", "contrib.sophia"),
}
"""One of each way to read gradients: number by number, by array, by all arrays, factored, with noise, conditionals, the loss.

The others need --slow.
"""
PARTS = {name for name in NAMES if name.replace("scale_by_", "") in set(NAMES) - {name}}
"""`scale_by_adam` and the like: `adam`, which is tested too, is this and a rate (asserted below)."""
STILL = {"optax.set_to_zero", "optax.freeze"}
"""Those that leave the parameters where they are."""


def block():
    return fnn.serial(fnn.dense(4), fnn.batch_norm(), fnn.activation("tanh"), fnn.dropout(0.1))


LOOPED = fnn.serial(fnn.dense(4), fnn.repeat(block(), DEPTH, unroll=1), fnn.dense(3))
WRITTEN_OUT = fnn.serial(fnn.dense(4), fnn.serial(*[block()] * DEPTH), fnn.dense(3))


def looped_form(params):
    head, trunk, tail = params
    return head, fnn.tree.stack(trunk), tail


def looped_batches(batches):
    """Trees of arrays with a leading axis of steps, the trunk's blocks stacked behind it."""
    head, trunk, tail = batches
    return head, Stacked(jax.tree.map(lambda *leaves: np.stack(leaves, 1), *trunk)), tail


def drawn():
    """Parameters of scales that differ from block to block, the net's state, and a batch for each step, in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, 8, 5))
    y = rng.integers(0, 3, size=(STEPS, 8))
    params, state = jax.eval_shape(lambda key: WRITTEN_OUT.init(key, x[0]), jax.random.key(0))
    params = jax.tree.map(lambda s: np.exp(rng.uniform(-1, 1)) * 0.5 * rng.normal(size=s.shape), params)
    return params, jax.tree.map(lambda s: np.zeros(s.shape), state), (x, y)


def by_hand(name, loss, params, rest, batches):
    """Train as optax's documentation says, with a loss (params, rest, batch, step) -> (value, rest)."""
    tx = optax.with_extra_args_support(optax_table.make(name))

    def step(carry, batch):
        params, state, rest, number = carry
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, batch, number)
        again = lambda params: loss(params, rest, batch, number)[0]  # noqa: E731
        extra = {"value": value, "grad": grads, "value_fn": again, "obj_fn": again}
        extra["grad_fn"] = lambda params, _: jax.grad(again)(params)
        extra = {given: extra[given] for given in EXTRA.get(name, ["value", "grad"])}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state, new, number + 1), value

    start = params, tx.init(params), rest, jnp.zeros((), jnp.int32)
    (params, _, rest, _), losses = jax.lax.scan(step, start, batches)
    return params, rest, losses


def assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def far_from(params, rest, targets, step):
    """A loss without a net, since it compiles faster: sum of tanh(target - params)²."""
    parts = jax.tree.map(lambda a, b: jnp.sum(jnp.tanh(b - a) ** 2), params, targets)
    return sum(jax.tree.leaves(parts)), rest


def few():
    """A matrix before and a vector behind a trunk of two blocks of both: programs of fewer arrays compile faster."""
    (head, trunk, tail), *_ = drawn()
    return {"kernel": head["kernel"]}, tuple(block[0] for block in trunk[:2]), {"bias": tail["bias"]}


def near(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.3 * rng.normal(size=(STEPS, *a.shape)), params)


def by_wrapper(name, wrap, params, targets):
    """Train as a train step does, on that loss."""
    tx = wrap(optax_table.make(name))
    state = tx.init(params)
    admission.optimizer_state("a test", state)

    def step(carry, targets):
        params, state = carry
        again = lambda params: far_from(params, (), targets, 0)[0]  # noqa: E731
        value, grads = jax.value_and_grad(again)(params)
        extra = offered(value, grads, again, jax.grad(again))
        updates, state = admission.update("a test", tx, grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, state), targets)
    return params, (), losses


@pytest.mark.usefixtures("x64")  # signs of small gradients are rounding in float32
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n.removeprefix("optax.") not in KINDS)) for n in NAMES]
)
def test_every_optimiser_of_optax_treats_repeat_as_by_hand(name):
    params = few()
    targets = near(params)
    looped = looped_form(params), looped_batches(targets)
    wraps = [optimizers.per_depth]
    if name in EXTRA and name not in RANDOM:  # those that cannot tell a stack from its blocks
        wraps.append(optimizers.stacked)

    @jax.jit  # one program: it compiles faster than one for each
    def trained(given, looped):
        return by_hand(name, far_from, given[0], (), given[1]), [by_wrapper(name, wrap, *looped) for wrap in wraps]

    wanted, found = jax.device_get(trained((params, targets), looped))
    for ends in found:
        assert_close(ends, (looped_form(wanted[0]), *wanted[1:]))
    moved = max(np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (wanted[0], params)), strict=True))
    assert moved > 1e-4 or name in STILL


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[pytest.mark.slow] * (form not in IN_NETS.get(name, ())))
        for name in NAMES
        for form in ("looped", "written_out")
    ],
)
def test_every_optimiser_of_optax_trains_nets_as_by_hand(name, form):
    """With batch norm and dropout: what takes the loss again takes the same one."""

    def loss(params, net_state, batch, step):
        key = jax.random.fold_in(jax.random.key(7), step)
        outputs, new = WRITTEN_OUT.apply(params, net_state, batch[0], key=key, train=True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, batch[1])), new

    def by_step(net, params, net_state, batches):
        tx = optax_table.make(name)
        step = fnn.train_step(net, fnn.losses.cross_entropy, tx, metrics=("loss",))
        opt_state = fnn.optimizers.per_depth(tx).init(params)
        state = fnn.TrainState(params, net_state, opt_state, jax.random.key(7), jnp.zeros((), jnp.int32))
        state, metrics = jax.lax.scan(step.pure, state, batches)
        return state.params, state.net_state, metrics["loss"]

    params, net_state, batches = drawn()
    wanted = jax.jit(lambda *args: by_hand(name, loss, *args))(params, net_state, batches)
    if form == "looped":
        params, net_state, wanted = *map(looped_form, (params, net_state)), (*map(looped_form, wanted[:2]), wanted[2])
    net = LOOPED if form == "looped" else WRITTEN_OUT
    assert_close(jax.jit(lambda *args: by_step(net, *args))(params, net_state, batches), wanted)


def test_the_table_knows_every_public_function_of_optax():
    """One that is new, and needs arguments, must get them in `MADE`, or a reason in `LEFT_OUT`."""
    there = optax_table.candidates().keys()
    assert len(there) > 120 and there >= optax_table.MADE.keys() and there >= optax_table.LEFT_OUT.keys()
    for name in NAMES:
        tx = optax_table.make(name)
        assert hasattr(tx, "init") and hasattr(tx, "update"), name
    for name in PARTS:
        whole = inspect.getsource(optax_table.candidates()[name.replace("scale_by_", "")])
        assert f"{name.rpartition('.')[2]}(" in whole, name
