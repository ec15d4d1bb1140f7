"""`save` and `load`: what is read back has the same bits, types and places, and what does not fit is refused by its path."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import equinox
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import assert_same
from flax import nnx

import fnn

NET = fnn.serial(fnn.dense(4), fnn.repeat(fnn.residual(fnn.dense(4)), 3), fnn.batch_norm(), fnn.dense(3))
KEY = jax.random.key(0)
X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)


def bits(leaf):
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    a = np.asarray(leaf)
    return a.dtype, a.shape, a.tobytes()


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.dtype == v.dtype and bits(u) == bits(v)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.npz"


@pytest.mark.parametrize("key", [jax.random.key(1, impl="rbg"), jax.random.PRNGKey(2)], ids=lambda k: str(k.dtype))
def test_a_state_comes_back_bit_for_bit_and_trains_on_alike(path, key):
    optimizer = optax.chain(fnn.clip.by_global_norm(1.0), optax.adam(1e-2))
    step = fnn.train_step(NET, fnn.losses.cross_entropy, optimizer)
    batch = X, np.arange(8) % 3
    state = fnn.TrainState.create(NET, optimizer, key, X)
    state, _ = step(state, batch)
    fnn.save(path, state)
    like = jax.eval_shape(lambda: fnn.TrainState.create(NET, optimizer, key, X))
    for template in (state, like):
        assert_same_bits(fnn.load(path, template), state)
    found = fnn.load(path, like)
    assert_same_bits(step(found, batch)[0], step(state, batch)[0])


def test_numpy_reads_the_arrays_by_their_paths(path):
    tree = {"a": fnn.tree.Stacked({"w": jnp.arange(6.0).reshape(3, 2)}), "b": (np.float64(1 / 3), jnp.bfloat16(1.5))}
    fnn.save(path, tree)
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["a/[:]/w"], np.arange(6.0).reshape(3, 2))
        assert file["b/0"] == 1 / 3 and file["b/1"].dtype == np.uint16 and file["b/1"] == 0x3FC0  # 1.5 in bfloat16
        header = json.loads(file["fnn.json"])
    assert header["leaves"]["b/1"] == {"dtype": "bfloat16"} and header["format"] == 1


def test_every_dtype_and_shape(path):
    kinds = ("bfloat16", "float16", "float32", "int8", "uint8", "int32", "uint32", "bool", "float8_e4m3fn", "int4")
    rng = np.random.default_rng(0)
    arrays = {k: jnp.asarray(rng.integers(0, 2, (2, 3)), k) for k in kinds}
    arrays |= {f"{k} empty": jnp.zeros((0, 2), k) for k in kinds} | {f"{k} scalar": jnp.ones((), k) for k in kinds}
    arrays |= {
        "nan": jnp.array([np.nan, -np.inf, -0.0]),
        "float64": np.float64([1e300]),
        "keys": jax.random.split(KEY, 3),
    }
    arrays["fortran"] = np.asfortranarray(rng.normal(size=(3, 4)))
    arrays["strided"] = rng.normal(size=(6, 4))[::2, ::3]
    fnn.save(path, arrays)
    found = fnn.load(path, arrays)
    assert_same_bits(found, arrays)
    assert isinstance(found["float64"], np.ndarray) and isinstance(found["int8"], jax.Array)
    numbers = {"rate": 0.1, "count": 3, "on": True}
    fnn.save(path, numbers)
    assert fnn.load(path, numbers) == numbers and type(fnn.load(path, numbers)["count"]) is int
    fnn.save(path, ())
    assert fnn.load(path, ()) == ()
    fnn.save(path, jnp.ones(3))
    np.testing.assert_array_equal(fnn.load(path, jnp.zeros(3)), np.ones(3))


def test_models_of_other_libraries(path):
    _, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    fnn.save(path, params)
    assert_same_bits(fnn.load(path, jax.eval_shape(lambda: params)), params)
    model = equinox.nn.MLP(3, 2, 4, 2, key=KEY)
    with pytest.raises(TypeError, match=r"^save: every leaf must be an array or a number, got .* at 'activation'"):
        fnn.save(path, model)
    arrays, _ = equinox.partition(model, equinox.is_array)
    fnn.save(path, arrays)
    assert_same_bits(fnn.load(path, arrays), arrays)


def state(width=4, optimizer=None, dtype=jnp.float32):
    net = fnn.models.mlp(2, width, 3)
    made = fnn.TrainState.create(net, optimizer or optax.adam(0.1), KEY, X)
    return made.replace(params=jax.tree.map(lambda a: a.astype(dtype), made.params))


MISFITS = {
    "a wider net": (lambda: state(5), r"float32\[4\] at 'params/1/bias' where float32\[5\] is asked for"),
    "another dtype": (
        lambda: state(dtype=jnp.bfloat16),
        r"float32\[4\] at 'params/1/bias' where bfloat16\[4\] is asked",
    ),
    "another optimizer": (lambda: state(optimizer=optax.sgd(0.1)), "got one more leaf, at 'opt_state/0/count'"),
    "one with more": (lambda: {"state": state(), "more": X}, "got none at 'more'"),
    "another kind of key": (
        lambda: state().replace(key=jax.random.key(0, impl="rbg")),
        r"key<fry>\[\] at 'key' where key<rbg>\[\] is asked for",
    ),
    "no arrays": (lambda: {"a": "text"}, "got none at 'a'"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_tree_that_does_not_fit_is_named(path, name):
    like, sentence = MISFITS[name]
    fnn.save(path, state())
    with pytest.raises(ValueError, match=f"^load: the file must hold a tree like the one .*{sentence}") as error:
        fnn.load(path, like())
    assert "\n" not in str(error.value)


def test_files_that_are_none_say_so_in_a_sentence(path):
    fnn.save(path, state())
    whole = path.read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "flipped": bytearray(whole)}
    at = whole.index(b"params/1/kernel") + 200
    damaged["flipped"][at] ^= 1
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"^load: {re.escape(str(path))} must be a file that fnn.save or fit wrote"
        ) as e:
            fnn.load(path, state())
        assert "\n" not in str(e.value)
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match="^load: .* must be a file that fnn.save or fit wrote"):
        fnn.load(path, {"a": np.ones(3)})
    with pytest.raises(FileNotFoundError, match="^load: cannot read .*nothing.npz: No such file"):
        fnn.load(path.with_name("nothing.npz"), state())
    with pytest.raises(OSError, match="^save: cannot write .*: No such file"):
        fnn.save(path.parent / "no" / "such", X)


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_loading_executes_nothing(path):
    np.savez(path, a=np.array([Bomb()], object))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("fnn.json", json.dumps({"format": 1, "leaves": {"a": {"dtype": "object"}}}))
    with pytest.raises(ValueError, match="must be a file that fnn.save or fit wrote"):
        fnn.load(path, {"a": np.ones(1)})


def test_a_failed_write_leaves_what_was_there(path, monkeypatch):
    fnn.save(path, {"a": np.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="^save: cannot write .*No space left on device"):
        fnn.save(path, {"a": np.zeros(2)})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


EIGHT = """if True:
    import os, sys
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    import jax, jax.numpy as jnp, numpy as np, fnn
    from jax.sharding import NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((8,), ("d",))
    rows = NamedSharding(mesh, P("d"))
    everywhere = NamedSharding(mesh, P())
    like = {"w": jax.device_put(jnp.zeros((16, 2)), rows), "h": jax.device_put(jnp.zeros(8, jnp.bfloat16), rows)}
    like |= {"key": jax.device_put(jax.random.key(0), everywhere), "step": jax.device_put(jnp.int32(0), everywhere)}
    tree = fnn.load(sys.argv[1], like)
    assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like)))
    np.testing.assert_array_equal(tree["w"], np.arange(32.0).reshape(16, 2))
    fnn.save(sys.argv[2], tree | {"w": tree["w"] + 1})
    print(len(tree["w"].addressable_shards))
"""


def test_from_one_device_to_eight_and_back(path):
    tree = {"w": jnp.arange(32.0).reshape(16, 2), "h": jnp.arange(8, dtype=jnp.bfloat16) / 8}
    tree |= {"key": jax.random.key(7), "step": jnp.int32(5)}
    fnn.save(path, tree)
    back = path.with_name("back.npz")
    command = [sys.executable, "-c", EIGHT, str(path), str(back)]
    root = str(Path(__file__).parent.parent)
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert run.stdout == "8\n", run.stderr
    assert_same_bits(fnn.load(back, tree), tree | {"w": tree["w"] + 1})
    assert_same(jax.random.bits(fnn.load(back, tree)["key"]), jax.random.bits(tree["key"]))
    assert ml_dtypes.bfloat16 == fnn.load(back, tree)["h"].dtype
