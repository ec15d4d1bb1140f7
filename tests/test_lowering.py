"""Platforms: choices are made from the default device, and change no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_jax, started

import fnn
from fnn import lowering, tree
from fnn.theory import gaussian


def test_the_platform_is_that_of_the_default_device():
    assert lowering.platform() == jax.default_backend()
    for device in ("cpu", lowering.host()) if lowering.host() else ():
        with jax.default_device(device):
            assert lowering.platform() == "cpu"


LAYERS = fnn.conv(4, 3), fnn.conv(4, 3, stride=2, groups=2), fnn.max_pool(2)
NET = fnn.serial(*LAYERS, fnn.flatten(), fnn.dense(3))
ATTEND = fnn.attention(2)


def computed(x):
    """Norms, attention, convolutions, a pool, and their gradients."""
    images, words, (params, state), (weights, memory) = x

    def loss(params, weights):
        size = jnp.sum(jnp.sin(NET.apply(params, state, images)[0]))
        return size + jnp.sum(jnp.cos(ATTEND.apply(weights, memory, words)[0]))

    value, grads = jax.value_and_grad(loss, (0, 1))(params, weights)
    return value, grads, tree.norm(grads), tree.norms(grads)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    images, words = (as_jax(rng.normal(size=shape), jnp.float32) for shape in ((2, 8, 8, 2), (2, 5, 4)))
    return images, words, started(NET.init, images), started(ATTEND.init, words)


def test_other_platforms_choices_have_the_same_values(inputs, monkeypatch):
    here = jax.jit(computed)(inputs)
    jax.clear_caches()
    monkeypatch.setattr(lowering, "platform", lambda: "gpu")
    there = jax.jit(computed)(inputs)
    jax.clear_caches()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), there, here)


def test_an_accelerators_gradient_of_cross_entropy_is_the_same(monkeypatch):
    """There labels are compared with all classes: no zeros as large as the logits, into which a number is scattered."""
    rng = np.random.default_rng(0)
    logits, labels = as_jax(rng.normal(size=(4, 5, 3)), jnp.float32), rng.integers(-1, 4, size=(4, 5)).astype(np.int8)

    def derivatives(logits):
        def mean(logits):
            return jnp.nanmean(fnn.losses.cross_entropy(logits, labels)), fnn.losses.cross_entropy(logits, labels)

        gradient, values = jax.grad(mean, has_aux=True)(logits)
        return values, gradient, jax.jvp(jax.grad(lambda x: mean(x)[0]), (logits,), (logits,))[1]

    wanted = jax.jit(derivatives)(logits)
    monkeypatch.setattr(lowering, "platform", lambda: "gpu")
    found = jax.jit(lambda logits: derivatives(logits))(logits)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "scatter" not in str(jax.make_jaxpr(lambda x: derivatives(x))(logits))


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_an_accelerators_readings_of_watch_are_the_same(monkeypatch, size):
    """Sums there are one reduction, not folds; at any scale."""
    rng = np.random.default_rng(0)
    params = [as_jax(rng.normal(size=shape), jnp.float32) / 6 for shape in ((40, 24), (24, 24), (24, 3))]
    x = as_jax(rng.normal(size=(130, 40)), jnp.float32) * size

    def loss(params, x):
        first, *others = params
        h = jax.nn.relu(x @ first)
        for w in others:
            h = h @ w
        return jnp.mean(h / size)

    def readings():
        jax.clear_caches()
        table = fnn.watch(loss)(params, x).table()
        return table["value"].to_numpy()

    here = readings()
    monkeypatch.setattr(lowering, "platform", lambda: "gpu")
    there = readings()
    jax.clear_caches()
    assert len(here) > 20
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-6)


def test_a_program_for_another_platform_holds_no_question():
    """Exported for two platforms it is one program, and runs here with the same values."""
    x = jnp.linspace(-1, 1, 12).reshape(3, 4)
    both = jax.export.export(jax.jit(tree.norm), platforms=("cpu", "cuda"))(x)
    assert float(both.call(x)) == pytest.approx(float(tree.norm(x)), rel=1e-6)
    assert "platform_index" not in str(jax.make_jaxpr(tree.norm)(x))


@pytest.fixture
def gpu(monkeypatch):
    """Let all choices be a GPU's; what is compiled is not kept for others."""
    jax.clear_caches()
    monkeypatch.setattr(lowering, "platform", lambda: "gpu")
    yield
    jax.clear_caches()


def lowered(function, *args):
    """The text of a program for a GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def products(text):
    """Whether each product is exact, in order: [True, False, ...]."""
    return ["HIGHEST, HIGHEST" in line for line in text.splitlines() if "stablehlo.dot_general" in line]


def test_inner_products_that_cancel_are_exact_and_layers_follow_the_users_default(gpu):
    rng = np.random.default_rng(0)
    x = as_jax(rng.normal(size=(6, 3, 40)), jnp.float32)  # 3 positions: Gram matrices over them
    params = {"kernel": as_jax(rng.normal(size=(40, 50)), jnp.float32)}

    def gradients(params, x):
        return fnn.per_example(lambda p, x: jnp.sum(jnp.sin(x @ p["kernel"])))(params, x)

    forward, *rest = products(lowered(lambda p, x: gradients(p, x).norms(), params, x))
    assert not forward and len(rest) >= 2 and all(rest)
    assert any(products(lowered(lambda p, x: gradients(p, x).gram(), params, x)))
    forward, *rest = products(lowered(lambda p, x: gradients(p, x).variance(), params, x))
    assert not forward and all(rest)
    assert not any(products(lowered(lambda p, x: gradients(p, x).mean(), params, x)))  # as accurate as any gradient
    net = fnn.serial(fnn.dense(8), fnn.attention(2), fnn.flatten(), fnn.dense(3))
    weights, state = net.init(jax.random.key(0), x)
    grad = jax.grad(lambda w, x: jnp.sum(net.apply(w, state, x)[0]))
    assert not any(products(lowered(grad, weights, x)))
    with jax.default_matmul_precision("highest"):
        assert all(products(lowered(grad, weights, x)))


@pytest.mark.parametrize("options", [{}, {"per_example": "clip", "max_norm": 1.0}], ids=["plain", "clipped"])
def test_a_step_on_a_gpu_waits_for_no_number(gpu, options):
    net, tx = fnn.models.mlp(3, 8, 3, norm="layer_norm", unroll=1), fnn.clip.adaptive(0.1)
    x, y = jnp.ones((4, 5)), jnp.zeros(4, jnp.int32)
    state = fnn.TrainState.create(net, tx, jax.random.key(0), x)
    text = lowered(fnn.train_step(net, fnn.losses.cross_entropy, tx, **options).pure, state, (x, y))
    assert "stablehlo.while" in text and "stablehlo.case" not in text and "stablehlo.if" not in text


def test_a_weighted_sum_on_a_gpu_takes_the_way_that_is_right_for_all_weights(gpu):
    x, w = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.array([1.0, 1e-30, 1e30, 0.0])

    def weighted(p, x, w):
        return fnn.per_example(lambda p, x: jnp.sum(jnp.sin(x @ p)))(p, x).weighted_sum(w)

    p = jnp.full((3, 2), 0.1)
    assert "stablehlo.case" not in lowered(weighted, p, x, w)
    each = jax.jit(jax.vmap(jax.grad(lambda p, x: jnp.sum(jnp.sin(x @ p))), (None, 0)))(p, x)
    np.testing.assert_allclose(weighted(p, x, w), jnp.einsum("i,ijk->jk", w, each, precision="highest"), rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "length", "masked", "expected"),
    [
        (jnp.bfloat16, 2, 2, 128, False, ["cudnn"]),
        (jnp.float16, 4, 2, 64, False, ["cudnn"]),
        (jnp.bfloat16, 2, 2, 100, False, []),  # cuDNN has not all lengths
        (jnp.bfloat16, 8, 8, 64, False, []),  # heads of 4
        (jnp.bfloat16, 2, 2, 64, True, []),
        (jnp.float32, 2, 2, 64, False, []),
        (jnp.float32, 4, 2, 64, False, [None]),
    ],
)
def test_who_computes_attention_on_a_gpu(gpu, monkeypatch, dtype, heads, kv_heads, length, masked, expected):
    """Without cuDNN, which JAX reports while it traces, the values are those of the products written out."""
    asked, of_jax = [], jax.nn.dot_product_attention

    def counted(*args, implementation=None, **options):
        asked.append(implementation)
        if implementation == "cudnn":
            raise RuntimeError("cuDNN is not detected.")
        return of_jax(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", counted)
    layer = fnn.attention(heads, causal=True, kv_heads=kv_heads)
    x = as_jax(np.random.default_rng(0).normal(size=(2, length, 32)), jnp.float32)
    params, state = jax.jit(layer.init)(jax.random.key(0), x)
    x = x.astype(dtype)
    given = fnn.Masked(x, np.ones((2, length), bool)) if masked else x
    y, _ = jax.jit(lambda *args: layer.apply(*args))(params, state, given)
    assert asked == expected
    monkeypatch.undo()
    exact, _ = jax.jit(lambda *args: layer.apply(*args))(params, state, x.astype(jnp.float32))
    y = as_jax(y.values if masked else y, jnp.float32)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 if dtype == jnp.float32 else 0.03)


def test_axes_that_may_be_sharded_stay_apart_on_a_gpu(gpu):
    x = jnp.ones((2, 3, 4))
    params, state = fnn.dense(5).init(jax.random.key(0), x)
    text = lowered(lambda p, x: fnn.dense(5).apply(p, state, x)[0], params, x)
    assert "stablehlo.dot_general" in text and "stablehlo.reshape" not in text


def test_programs_run_on_the_device_that_jax_was_told_to_use():
    assert lowering.devices() == jax.local_devices()
    last = jax.local_devices()[-1]
    for device in (last, last.platform):
        with jax.default_device(device):
            assert [d.platform for d in lowering.devices()] == [last.platform]
    with jax.default_device(last):
        assert lowering.worker_settings()[1] == len(jax.local_devices()) - 1


def test_where_jax_has_no_cpu_theory_is_computed_on_the_device(monkeypatch):
    """`JAX_PLATFORMS=cuda` starts no CPU: a cell that has been measured must not be lost for it."""
    h = np.linspace(-3, 3, 7)
    before = gaussian.evaluate(fnn.activations.get("tanh"), h)
    study = fnn.Study(
        fnn.grid.product(depth=2, width=4, activation="tanh", norm="none"),
        seeds=1,
        steps=0,
        data="clusters",
        quantities=("log10_error",),
    )
    expected, of_jax = study.run().table(), jax.local_devices

    def none(*args, backend=None, **options):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return of_jax(*args, backend=backend, **options)

    monkeypatch.setattr(jax, "local_devices", none)
    assert lowering.host() is None
    np.testing.assert_allclose(gaussian.evaluate(fnn.activations.get("tanh"), h), before, rtol=1e-14)
    np.testing.assert_allclose(before, [np.tanh(h), 1 / np.cosh(h) ** 2], rtol=1e-12)
    again = study.run().table()
    assert again.columns == expected.columns and again.height == expected.height
    np.testing.assert_allclose(again["predicted"].drop_nulls(), expected["predicted"].drop_nulls(), rtol=1e-6)


def test_worker_processes_do_not_share_a_gpu_of_which_each_takes_most(monkeypatch):
    from fnn.study.spawning import check_spawning

    monkeypatch.setattr(lowering, "platform", lambda: "gpu")
    for name in ("PREALLOCATE", "MEM_FRACTION"):
        monkeypatch.delenv(f"XLA_PYTHON_CLIENT_{name}", raising=False)
    check_spawning(None, 1, {})
    with pytest.raises(ValueError, match="cannot share an accelerator .* got workers=2; use workers=1"):
        check_spawning(None, 2, {})
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    check_spawning(None, 2, {})
