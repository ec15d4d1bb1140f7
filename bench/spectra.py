"""The suite `spectra`: Hessian products, the top eigenvalue, and tangent kernels, beside PyTorch's curvlinops."""

import importlib.util
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from bench import timing
from bench.problem import Row
from bench.remote import Remote
from bench.report import Section, describe_error

ABOUT = """\
A tanh MLP with the cross entropy of 10 classes, float32, the same weights and batch everywhere. `one product` is
`curvature(loss)(params, x, y).hessian.product(v)`; `of ten` is one of ten products in a program. `cold` is the largest
Hessian eigenvalue to 1 % from nothing, `cold, moved` and `warm` that after a step of gradient descent, from nothing and from
the pairs before it; the chance that a larger one was missed is brought to 2 % or less. With `residuals` they stop at the
residual alone, as ARPACK does: curvlinops (PyTorch, in a process of its own) with SciPy's at the same tolerance. The tangent kernel of 256
examples is that of each output, by `fnn.kernel` and from Jacobians stored in full. Rounds are interleaved; medians,
and `x gradient` is the median of the ratios within each round. Memory is XLA's temporary memory."""

COLUMNS = ("what", "ms", "x gradient", "products", "MB", "x gradient's")
NAMES = {"fnn": "fnn.curvature and fnn.kernel", "curvlinops": "PyTorch, with SciPy's eigsh", "stacked": "jax.jacrev"}
ROWS, EXAMPLES = (Row(256, 4, 512),), 256
TOLERANCE = 0.01


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Time a row's ways in turn; yield its two tables."""
    rounds = options.rounds or (2 if options.quick else 11)
    peers = options.peers or NAMES
    for row in options.rows or ((Row(16, 2, 32),) if options.quick else ROWS):
        yield _curvature(row, rounds, "curvlinops" in peers, say)
        yield _kernel(row, rounds, 16 if options.quick else EXAMPLES, say)


def problem(row: Row) -> tuple[list[dict[str, np.ndarray]], np.ndarray, np.ndarray]:
    """Draw weights N(0, 1.5²/fan_in), zero biases, and a batch: (layers, x float32[batch, 64], y int32[batch])."""
    rng, sizes = np.random.default_rng(0), [64, *[row.width] * row.depth, 10]
    layers = [
        {
            "kernel": (1.5 * rng.normal(size=(n, m)) / np.sqrt(n)).astype(np.float32),
            "bias": np.zeros(m, np.float32),
        }
        for n, m in itertools.pairwise(sizes)
    ]
    return layers, rng.normal(size=(row.batch, 64)).astype(np.float32), rng.integers(0, 10, row.batch, np.int32)


def outputs(params: Any, x: jax.Array) -> jax.Array:
    """The net: float[..., 64] -> float[..., 10]."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs(params, x), y))


def _curvature(row: Row, rounds: int, torch: bool, say: Callable[[str], None]) -> Section:
    params, x, y = jax.tree.map(jnp.asarray, problem(row))
    ones = jax.tree.map(jnp.ones_like, params)
    make = fnn.curvature(loss)
    before = make(params, x, y)
    cold = before.hessian.eigenvalues(tolerance=TOLERANCE)
    moved = jax.tree.map(lambda p, g: p - g / cold.values[0], params, before.gradient())
    after = make(moved, x, y)
    exact = [c.hessian.eigenvalues(tolerance=1e-4, max_products=100, start=cold) for c in (before, after)]
    value, overlap = float(exact[0].values[0]), abs(float(jnp.vdot(exact[0].vectors[0], exact[1].vectors[0])))

    def ten(p, v):
        return jax.lax.fori_loop(0, 10, lambda _, v: make(p, x, y).hessian.product(v), v)

    searches = {
        name + words: lambda c=c, start=start, missed=missed: c.hessian.eigenvalues(
            tolerance=TOLERANCE, start=start, missed=missed
        )
        for name, c, start in (("cold", before, None), ("cold, moved", after, None), ("warm", after, cold))
        for words, missed in (("", 0.02), (", residuals", 1))
    }
    programs = {
        "gradient": jax.jit(jax.grad(loss)).lower(params, x, y).compile(),
        "one product": jax.jit(lambda p, v: make(p, x, y).hessian.product(v)).lower(params, ones).compile(),
        "of ten": jax.jit(ten).lower(params, ones).compile(),
    }
    ways = {
        "gradient": lambda: programs["gradient"](params, x, y),
        "one product": lambda: before.hessian.product(ones),
        "of ten": lambda: programs["of ten"](params, ones),
    } | {name: lambda f=f: f().values for name, f in searches.items()}
    runs: dict[str, Any] = {name: timing.Run(lambda _, i, f=f: (None, f()), None, (0,)) for name, f in ways.items()}
    products, notes = {name: str(search().products) for name, search in searches.items()}, []
    if torch:
        try:
            for name in ("gradient", "product", "cold"):
                remote = Remote(torch_run, name, row)
                _, found = remote.first_round()
                runs[f"curvlinops, {name}"] = remote
            products["curvlinops, cold"] = str(int(found[1]))
            theirs = float(found[2])
            notes.append(f"top eigenvalue: fnn {value:.6g}, curvlinops {theirs:.6g}, to 1e-4 or better each")
            if abs(theirs / value - 1) > 1e-3:
                notes.append("warning: the eigenvalues differ by more than 1e-3")
        except Exception as error:
            notes.append(f"curvlinops: {describe_error(error)}")
    times = timing.interleave(runs, rounds, 1, lambda i: say(f"  {row}: round {i} of {rounds}"))
    times["of ten"] = timing.Times(tuple(ms / 10 for ms in times["of ten"].rounds))
    sizes = {name: _megabytes(program) for name, program in programs.items()}
    cells = []
    for name, found in times.items():
        memory = [f"{sizes[name]:.2f}", f"{sizes[name] / sizes['gradient']:.2f}"] if name in sizes else ["", ""]
        ratio = timing.ratio(found, times["gradient"]).median
        cells.append((name, f"{found.median:.3f}", f"{ratio:.2f}", products.get(name, ""), *memory))
    notes.append(f"before and after the step the top eigenvectors overlap by {overlap:.3f}")
    notes.append(f"{rounds} rounds; {sum(a.size for a in jax.tree.leaves(params))} parameters")
    data = {"row": str(row), "ms": {name: t.rounds for name, t in times.items()}, "products": products, "MB": sizes}
    return Section(f"{row}, batch {row.batch}: curvature", COLUMNS, cells, notes, data)


def _kernel(row: Row, rounds: int, examples: int, say: Callable[[str], None]) -> Section:
    params, x, _ = jax.tree.map(jnp.asarray, problem(Row(row.width, row.depth, examples)))
    kernel = fnn.kernel(outputs)

    def stacked(params, x):
        found = jax.vmap(jax.jacrev(outputs), (None, 0))(params, x)
        flat = jnp.concatenate([a.reshape(*a.shape[:2], -1) for a in jax.tree.leaves(found)], axis=2)
        return jnp.einsum("iop,jop->oij", flat, flat)

    ways = {"fnn": lambda params, x: kernel(params, x).each, "stacked": stacked}
    programs = {name: jax.jit(f).lower(params, x).compile() for name, f in ways.items()}
    runs = {name: timing.Run(lambda _, i, f=f: (None, f(params, x)), None, (0,)) for name, f in programs.items()}
    matrices = {name: np.asarray(f(params, x)) for name, f in programs.items()}
    difference = np.max(np.abs(matrices["fnn"] - matrices["stacked"])) / np.max(np.abs(matrices["stacked"]))
    times = timing.interleave(runs, rounds, 1, lambda i: say(f"  {row}: kernel, round {i} of {rounds}"))
    sizes = {name: _megabytes(program) for name, program in programs.items()}
    cells = [
        (
            name,
            f"{found.median:.1f}",
            f"{timing.ratio(found, times['stacked']).median:.3f}",
            f"{sizes[name]:.1f}",
            f"{sizes[name] / sizes['stacked']:.3f}",
        )
        for name, found in times.items()
    ]
    notes = [f"{rounds} rounds; the matrices differ by {difference:.1g} of the largest number"]
    if difference > 1e-4:
        notes.append("warning: the kernels differ")
    data = {"row": str(row), "ms": {name: t.rounds for name, t in times.items()}, "MB": sizes}
    columns = ("way", "ms", "x stacked", "MB", "x stacked's")
    return Section(f"{row}: tangent kernel of {examples} examples, 10 outputs", columns, cells, notes, data)


def _megabytes(program: Any) -> float:
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes / 1e6 if analysis else float("nan")


def torch_run(what: str, row: Row) -> timing.Run:
    """Build a way of PyTorch, in its own process; `cold` says (0, products, the eigenvalue to 1e-6) of its first call."""
    if importlib.util.find_spec("curvlinops") is None:
        raise ImportError("curvlinops is not installed")
    import torch
    from curvlinops import HessianLinearOperator
    from scipy.sparse import linalg
    from torch import nn

    from bench.torch_peers import torch_device

    layers, x, y = problem(row)
    device, modules = torch_device(), []
    for layer in layers:
        linear = nn.Linear(*layer["kernel"].shape)
        linear.load_state_dict({"weight": torch.tensor(layer["kernel"].T.copy()), "bias": torch.tensor(layer["bias"])})
        modules += [linear, nn.Tanh()]
    net = nn.Sequential(*modules[:-1]).to(device)
    data = torch.tensor(x, device=device), torch.tensor(y, device=device).long()
    params = list(net.parameters())
    hessian = HessianLinearOperator(net, nn.CrossEntropyLoss(), params, [data], check_deterministic=False)
    v = torch.ones(hessian.shape[1], device=device)
    count = 0

    def multiply(w):
        nonlocal count
        count += 1
        return (hessian @ torch.tensor(w, dtype=torch.float32, device=device).ravel()).cpu().numpy()

    class Matrix(linalg.LinearOperator):
        def _matvec(self, x):
            return multiply(x)

    matrix = Matrix(np.float32, hessian.shape)
    start = np.random.default_rng(1).normal(size=hessian.shape[1]).astype(np.float32)

    def top(tolerance):
        return linalg.eigsh(matrix, k=1, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)[0]

    def call(state, _):
        if what == "gradient":
            return state, torch.autograd.grad(nn.functional.cross_entropy(net(data[0]), data[1]), params)
        return state, hessian @ v if what == "product" else top(TOLERANCE)

    def numbers(_):
        if what != "cold":
            return np.zeros(3)
        products = count
        return np.array([0, products, top(1e-6)])

    def wait(_):
        if device.type == "cuda":
            torch.cuda.synchronize()

    return timing.Run(call, None, (0,), numbers, wait)
