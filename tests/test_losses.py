"""Losses: values and gradients against closed forms in NumPy, in float64, and one clear sentence for bad targets."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, assert_same
from scipy import special

from fnn import losses

pytestmark = pytest.mark.usefixtures("optimised")

LOGITS = np.array(
    [[0.3, -1.2, 2.0], [5.0, 5.0, -40.0], [0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]
)
LABELS = np.array([2, 0, 1, 0, 1, 2])
BINARY = np.array([0.3, -1.2, 0.0, 40.0, -40.0, 1e4, 1e4, -1e4, -1e4])
BINARY_TARGETS = np.array([1.0, 1.0, 0.0, 0.0, 0.25, 1.0, 0.0, 0.0, 1.0])


def cross_entropy(logits, labels):
    return special.logsumexp(logits, axis=-1) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


def binary_cross_entropy(z, t):
    return np.logaddexp(0, z) - t * z


@functools.cache
def compiled(loss):
    """Gradient of the summed loss with respect to the outputs, losses per example, and which predictions are right."""
    correct = losses.correct(loss)

    def summed(outputs, targets):
        values = loss(outputs, targets)
        return jnp.sum(values), values

    @jax.jit
    def run(outputs, targets):
        gradient, values = jax.grad(summed, has_aux=True)(outputs, targets)
        return gradient, values, correct and correct(outputs, targets)

    return run


def test_cross_entropy_and_its_gradient(x64):
    gradient, values, _ = compiled(losses.cross_entropy)(LOGITS, LABELS)
    wanted = cross_entropy(LOGITS, LABELS)
    np.testing.assert_allclose(values, wanted, rtol=1e-12, atol=1e-15)
    assert wanted[3] == 0 and wanted[4] == 2e4  # finite where exp is not
    one_hot = np.eye(3)[LABELS]
    np.testing.assert_allclose(gradient, special.softmax(LOGITS, axis=-1) - one_hot, rtol=1e-12, atol=1e-15)
    assert values.dtype == gradient.dtype == jnp.float64


def test_cross_entropy_of_sequences_is_the_mean_over_positions(x64):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5, 3)), rng.integers(3, size=(4, 5))
    gradient, values, got = compiled(losses.cross_entropy)(logits, labels)
    np.testing.assert_allclose(values, cross_entropy(logits, labels).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(gradient, (special.softmax(logits, axis=-1) - np.eye(3)[labels]) / 5, rtol=1e-12)
    np.testing.assert_allclose(got, (logits.argmax(-1) == labels).mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("shapes", [((9,), (9,)), ((9, 1), (9,)), ((9,), (9, 1)), ((9, 1), (9, 1))])
def test_binary_cross_entropy_and_its_gradient(shapes, x64):
    z, t = BINARY.reshape(shapes[0]), BINARY_TARGETS.reshape(shapes[1])
    gradient, values, got = compiled(losses.binary_cross_entropy)(z, t)
    np.testing.assert_allclose(values, binary_cross_entropy(BINARY, BINARY_TARGETS), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(gradient.reshape(-1), special.expit(BINARY) - BINARY_TARGETS, rtol=1e-12, atol=1e-15)
    assert gradient.shape == z.shape and np.isfinite(values).all()
    np.testing.assert_array_equal(got, (BINARY > 0) == (BINARY_TARGETS > 0.5))


def test_binary_targets_of_any_real_type():
    z, t = np.array([0.5, -0.5, 2.0], np.float32), np.array([1, 0, 0])
    run = jax.jit(lambda z, *ts: [losses.binary_cross_entropy(z, t) for t in ts])
    for values in run(z, *(t.astype(dtype) for dtype in (bool, np.int32, np.uint8, np.float16))):
        np.testing.assert_allclose(values, binary_cross_entropy(z.astype(float), t), rtol=1e-6)


def test_binary_cross_entropy_is_cross_entropy_of_two_classes():
    z, t = np.linspace(-8, 8, 9).astype(np.float32), np.array([0, 1, 1, 0, 0, 1, 0, 1, 1])

    @jax.jit
    def run(z, t):
        return losses.binary_cross_entropy(z, t), losses.cross_entropy(jnp.stack([jnp.zeros_like(z), z], axis=-1), t)

    # 1e-6: log sum exp minus the logit, numbers up to 8 in float32
    np.testing.assert_allclose(*run(z, t), rtol=1e-6, atol=1e-6)


def test_mse_is_the_mean_over_units(x64):
    rng = np.random.default_rng(1)
    outputs, targets = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 3, 2))
    gradient, values, none = compiled(losses.mse)(outputs, targets)
    np.testing.assert_allclose(values, ((outputs - targets) ** 2).mean(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(gradient, 2 * (outputs - targets) / 6, rtol=1e-12)
    one_unit = jax.jit(losses.mse)(outputs[:, 0, 0], targets[:, 0, 0])
    np.testing.assert_allclose(one_unit, (outputs - targets)[:, 0, 0] ** 2, rtol=1e-12)
    assert losses.mse.correct is losses.correct(losses.mse) is none is None


def test_bfloat16_outputs_give_float32_losses():
    """The sums are taken in float32: only the rounding of the logits themselves is left, and that is undone here."""
    rng = np.random.default_rng(2)
    z = as_jax(3 * rng.normal(size=(4, 300)), jnp.bfloat16)
    exact, labels = np.asarray(z, np.float64), rng.integers(300, size=4)

    @jax.jit
    def run(z, labels):
        return (
            losses.cross_entropy(z, labels),
            losses.binary_cross_entropy(z[:, 0], labels > -1),
            losses.mse(z, jnp.zeros_like(z)),
        )

    wanted = cross_entropy(exact, labels), binary_cross_entropy(exact[:, 0], 1), (exact**2).mean(axis=1)
    for got, value in zip(run(z, labels), wanted, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, value, rtol=1e-6)


INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
LABELLED = [  # loss, shape of the outputs, labels
    ("cross_entropy", (4, 300), [0, 100, 127, 3]),
    ("cross_entropy", (2, 2, 256), [[0, 100], [127, 3]]),
    ("sequence_cross_entropy", (2, 2, 256), [[0, 100], [127, 3]]),
    ("sequence_cross_entropy", (2, 2, 200), [[-1, 100], [127, -1]]),
    ("binary_cross_entropy", (4,), [0, 1, 1, 0]),
    ("mse", (4, 2), [[0, 100], [127, 3], [5, 6], [1, 1]]),
]


@pytest.mark.parametrize(("name", "shape", "labels"), LABELLED)
def test_the_integer_dtype_of_labels_does_not_matter(name, shape, labels):
    """Losses, gradients, what counts as right, the check on the host: in eight dtypes, those of int32 bit for bit."""
    loss, labels = getattr(losses, name), np.array(labels)
    outputs = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    outputs = outputs + 10 * (np.arange(shape[-1]) == labels[..., None]) if outputs.ndim > labels.ndim else outputs
    dtypes = [d for d in INTEGERS if labels.min() >= 0 or np.issubdtype(d, np.signedinteger)]
    with jax.enable_x64(True):
        every = [labels.astype(dtype) for dtype in dtypes]
        found = jax.jit(lambda outputs, every: [compiled(loss)(outputs, labels) for labels in every])(outputs, every)
        for labels in every:
            losses.check_targets(loss, shape, labels)
    expected = found[dtypes.index("int32")]
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(expected)) and (expected[2] is None or np.any(expected[2]))
    for one in found:
        assert_same(one, expected)


@pytest.mark.parametrize("name", ["cross_entropy", "sequence_cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("label", [2**32 + 1, 2**32, 2**31 + 1, -(2**32) + 1])
def test_labels_beyond_int32_never_count_as_others(name, label):
    """Without x64 JAX takes 2^32 + 1 as 1: outside of jit the loss sees the label as it is, and refuses it."""
    loss, labels = getattr(losses, name), np.array([[label, 1]])
    outputs = np.zeros((1, 2, 3), np.float32)
    if name == "binary_cross_entropy":
        labels, outputs = labels[0], outputs[0, :, 0]
    assert not np.all(loss.correct(outputs, labels))
    for call in (lambda: loss(outputs, labels), lambda: losses.check_targets(loss, outputs.shape, labels)):
        with pytest.raises(ValueError, match="must (lie in 0|fit in int32)"):
            call()


def test_labels_out_of_range_are_nan_inside_jit_and_refused_on_the_host():
    logits, labels = np.zeros((4, 3), np.float32), np.array([0, -1, 2, 3])
    gradient, values, _ = compiled(losses.cross_entropy)(logits, labels)
    np.testing.assert_allclose(values, [np.log(3), np.nan, np.log(3), np.nan], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), [False, True, False, True])
    np.testing.assert_allclose(gradient[::2], 1 / 3 - np.eye(3)[[0, 2]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"cross_entropy: labels must lie in 0\.\.2, got -1\.\.3; renumber"):
        losses.check_targets(losses.cross_entropy, (4, 3), labels)
    z, t = np.zeros(3, np.float32), np.array([1.0, 2.0, -0.5], np.float32)
    gradient, values, _ = compiled(losses.binary_cross_entropy)(z, t)
    np.testing.assert_allclose(values, [np.log(2), np.nan, np.nan], rtol=1e-6)
    np.testing.assert_allclose(gradient, [-0.5, np.nan, np.nan], rtol=1e-6)
    logits = np.zeros((4, 2, 3), np.float32)
    labels = np.array([[0, -1], [-2, 1], [3, -1], [-1, -1]])
    gradient, values, _ = compiled(losses.sequence_cross_entropy)(logits, labels)
    np.testing.assert_allclose(values, [np.log(3), np.nan, np.nan, 0], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), [[False] * 2, [True] * 2, [True, False], [False] * 2])
    labels = np.array([[0, 1], [3, 1]])
    gradient, values, _ = compiled(losses.cross_entropy)(logits[:2], labels)
    np.testing.assert_allclose(values, [np.log(3), np.nan], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), [[False, False], [True, False]])
    with pytest.raises(ValueError, match=r"binary_cross_entropy: targets must lie in 0\.\.1, got 2\.0; rescale"):
        losses.check_targets(losses.binary_cross_entropy, (3,), t)


@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf, 3e38])
def test_outputs_without_a_target_change_nothing(fill):
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    labels = np.array([[-1, 2, 0, -1], [-1, -1, -1, -1], [4, 3, 2, 1]])
    expected = compiled(losses.sequence_cross_entropy)(logits, labels)
    filled = np.where((labels == -1)[..., None], np.float32(fill), logits)
    jax.tree.map(np.testing.assert_array_equal, compiled(losses.sequence_cross_entropy)(filled, labels), expected)
    assert not np.any(expected[0][labels == -1]) and np.all(expected[0][labels != -1])


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_the_host_check_of_binary_targets(bad):
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.1, got"):
        losses.binary_cross_entropy.check((2,), np.array([0.5, bad]))
    losses.binary_cross_entropy.check((2,), np.array([True, False]))
    losses.binary_cross_entropy.check((0,), np.array([]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_host_check_of_values(bad):
    with pytest.raises(ValueError, match="mse: targets must be finite, got NaN or inf"):
        losses.check_targets(losses.mse, (2,), np.array([0.5, bad]))
    losses.check_targets(losses.mse, (2,), np.array([0.5, -7.0]))


def test_the_host_check_accepts_good_targets_and_passes_traced_ones():
    losses.check_targets(losses.cross_entropy, (3, 10), np.array([0, 9, 4]))
    losses.check_targets(losses.cross_entropy, (0, 10), np.zeros(0, int))

    @jax.jit
    def inside(labels):
        losses.check_targets(losses.cross_entropy, (2, 3), labels)
        return losses.cross_entropy(jnp.zeros((2, 3)), labels)

    np.testing.assert_allclose(inside(np.array([1, 7])), [np.log(3), np.nan], rtol=1e-6)


def test_accuracy():
    outputs = np.array([[0.1, 0.9], [0.6, 0.4], [0.2, 0.8]], np.float32)
    got = jax.jit(losses.cross_entropy.correct)(outputs, np.array([1, 1, 1]))
    np.testing.assert_array_equal(got, [1, 0, 1])
    assert got.dtype == jnp.float32
    got = jax.jit(losses.binary_cross_entropy.correct)(np.array([2.0, -1.0, 0.0], np.float32), np.array([1, 1, 0]))
    np.testing.assert_array_equal(got, [1, 0, 1])


def test_a_plain_function_is_a_loss_without_accuracy_or_checks():
    def mine(outputs, targets):
        return jnp.abs(outputs - targets)

    assert losses.correct(mine) is None
    assert losses.check_targets(mine, (2,), np.array([np.nan, 1.0])) is None


@pytest.mark.parametrize(
    "loss, outputs, targets, message",
    [
        ("cross_entropy", (4, 3), (5,), "cross_entropy: needs logits float[batch, ..., classes] and labels int[batch,"),
        ("cross_entropy", (4, 3), (4, 1), "got float32[4,3] and int32[4,1]"),
        ("cross_entropy", (4, 5, 3), (4,), "got float32[4,5,3] and int32[4]"),
        ("cross_entropy", (4,), (4,), "got float32[4] and int32[4]"),
        (
            "binary_cross_entropy",
            (4, 2),
            (4,),
            "binary_cross_entropy: needs one logit and one target for each example,",
        ),
        ("binary_cross_entropy", (4,), (3,), "got float32[4] and int32[3]"),
        ("binary_cross_entropy", (4, 1, 1), (4,), "got float32[4,1,1] and int32[4]"),
        ("binary_cross_entropy", (), (), "got float32[] and int32[]"),
        (
            "mse",
            (4, 1),
            (4,),
            "mse: outputs and targets must have the same shape, got float32[4,1] and int32[4]; reshape",
        ),
        ("mse", (4,), (1,), "got float32[4] and int32[1]"),
    ],
)
def test_shapes_that_do_not_match_are_refused(loss, outputs, targets, message):
    with pytest.raises(ValueError) as error:
        getattr(losses, loss)(np.zeros(outputs, np.float32), np.zeros(targets, np.int32))
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_labels_that_are_not_integers_are_a_type_error(dtype):
    labels = np.zeros(4, dtype)
    message = rf"cross_entropy: labels must be integers, got {labels.dtype}\[4\]; use labels.astype\(int\)"
    with pytest.raises(TypeError, match=message):
        losses.cross_entropy(np.zeros((4, 3), np.float32), labels)
    with pytest.raises(TypeError, match=message):
        losses.check_targets(losses.cross_entropy, (4, 3), labels)


def test_names():
    assert [repr(loss) for loss in (losses.cross_entropy, losses.binary_cross_entropy, losses.mse)] == [
        "Loss(cross_entropy)",
        "Loss(binary_cross_entropy)",
        "Loss(mse)",
    ]
    assert "-log softmax" in losses.cross_entropy.__doc__


@pytest.mark.parametrize(
    "name", ["cross_entropy", "sequence_cross_entropy", "token_cross_entropy", "binary_cross_entropy", "mse"]
)
def test_a_loss_is_itself_in_another_process_too(name):
    """A copy was taken for a loss of the user's own: studies of pairs refused it in workers."""
    loss = getattr(losses, name)
    assert pickle.loads(pickle.dumps(loss)) is loss and copy.deepcopy(loss) is loss


def test_a_loss_that_no_module_holds_is_copied():
    own = losses.Loss("own", np.subtract)
    other = pickle.loads(pickle.dumps(own))
    assert other is not own and other.name == "own" and other(np.float32([3]), np.float32([1])) == 2


@pytest.mark.parametrize(
    ("loss", "shape", "targets"),
    [
        (losses.cross_entropy, (4, 3), np.zeros(4, np.int32)),
        (losses.token_cross_entropy, (4, 2, 3), np.zeros((4, 2), np.int32)),
        (losses.sequence_cross_entropy, (4, 2, 3), np.zeros((4, 2), np.int32)),
        (losses.binary_cross_entropy, (4, 1), np.zeros(4, np.float32)),
    ],
)
def test_outputs_that_are_no_numbers_are_not_right(loss, shape, targets):
    """argmax of NaN is class 0, and NaN > 0 is false."""
    outputs = np.zeros(shape, np.float32) - np.float32([1, 2, 3])[: shape[-1]] * (shape[-1] == 1)
    outputs[..., 0] += 2 if shape[-1] > 1 else 0
    outputs[1, ..., -1] = np.nan
    found = loss.correct(outputs, targets)
    hits, counts = found if isinstance(found, tuple) else (found, np.ones(4))
    assert (np.asarray(hits) / counts).tolist() == [1, 0, 1, 1]
