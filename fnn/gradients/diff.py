"""`diff`: where do two losses begin to differ, layer by layer, forward and backward? For ports and refactorings."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, check, compiled, mapped
from fnn.gradients.difference import QUANTITIES, Both, Compared, Difference
from fnn.gradients.pairing import Distance, as_float64, beside, distance, paired, relative, role
from fnn.gradients.sides import EACH, WHOLE, LayerOf, Side, side
from fnn.tasks import ScalarLoss
from fnn.tree import PyTree

MARGIN = 5.0
"""How many times what rounding gives a difference must be, so that it counts."""
FLOOR = 100
"""How many units in the last place of the whole gradient a parameter's gradient may be wrong by: below a batch norm a bias's is
rounding alone."""
TOGETHER = "the parameters outside of products"


def diff(
    loss_a: ScalarLoss,
    loss_b: ScalarLoss,
    *,
    pairs: Mapping[str, str] | None = None,
    tolerance: float | None = None,
) -> Callable[..., Difference]:
    """Make `(params_a, params_b, *batch) -> Difference`: |a - b| / max(|a|, |b|), layer by layer, of two losses that should agree.

    For ports and refactorings: it says where values and gradients begin to differ by more than rounding. Both losses are
    `loss(params, *batch) -> float[]` of any framework, and get the same batch. Layers are products of data with a weight,
    found in the traced losses, loops over layers written out. They are paired in forward order by the sizes of their weights
    by role (in, out, positions of a kernel), whatever the layout: in x out or out x in, heads split or merged, channels first
    or last; one that stands for several with the same input (queries, keys and values; gates) with these. Of parallel layers,
    such as queries and keys, those of equal weights are paired. `pairs={path_a: path_b}` overrides; paths are those in the
    table.

    For each pair its weight, input, output (with the bias, if one follows) and gradient of the weight are compared. Where
    the order of axes is not known, the order in which both agree best counts. Where only the order of entries differs and
    the layer's output is the same (a flattened image, channels first or last), it is a matter of layout, and the note says so.

    A difference counts if it is larger than 5 times what rounding gives: the change when every parameter and input of
    `loss_a` is moved by one unit in the last place, or eps·max(1, √fan_in / 16), whichever is larger; or larger than
    `tolerance`. Gradients jump where a ReLU's argument near 0 changes sides: where forward values are equal, a difference
    no larger than the jumps that moving by √eps gives does not count, and the note says so. The whole gradients of parameters
    are compared too, all uses added up and biases and scales of norms among them: each by itself where both sides have the same
    paths, shapes and numbers, else those outside of products together by their sorted entries, which neither an order nor a
    swap changes; there 500 units in the last place of the whole gradient count as rounding. Products are computed with full
    precision (`jax.default_matmul_precision("highest")`).

    All values of both losses are held in memory. For the host.
    Errors: TypeError for traced arrays; ValueError for unknown paths in `pairs`, and for a loss that is no single float.

        found = fnn.diff(linen_loss, equinox_loss)(linen_params, equinox_params, batch)
        print(found)
        assert found.equal
    """
    for name, loss in (("loss_a", loss_a), ("loss_b", loss_b)):
        if not callable(loss):
            raise TypeError(f"diff: {name} must be a function (params, batch) -> float[], got {type(loss).__name__}")
    if tolerance is not None:
        check.above_zero("diff", tolerance=tolerance)

    def compare(params_a: PyTree, params_b: PyTree, *batch: PyTree) -> Difference:
        if compiled.traced((params_a, params_b, batch)):
            raise TypeError(
                "diff: it decides on the host, got traced arrays; call it outside of jit, grad, vmap and scan"
            )
        for params in (params_a, params_b):
            check.parameters("diff", params)
            check.alive("diff", params)
        rest = mapped.placed(arrays.arguments("diff", batch))
        params_a, params_b = mapped.placed((params_a, params_b))
        with jax.default_matmul_precision("highest"), mapped.on_automatic():
            return _compared(loss_a, loss_b, params_a, params_b, rest, dict(pairs or {}), tolerance)

    return compare


def _compared(
    loss_a: Any, loss_b: Any, params_a: Any, params_b: Any, rest: Any, pairs: dict[str, str], tolerance: float | None
) -> Difference:
    """Run both sides, and the first once more, moved a little; its seven arguments are those of `diff`."""
    sides = side("loss_a", loss_a, params_a, rest), side("loss_b", loss_b, params_b, rest)
    (value_a, seen_a), (value_b, seen_b) = sides[0].run(params_a, rest), sides[1].run(params_b, rest)
    a, b = sides[0].layers(seen_a), sides[1].layers(seen_b)
    eps = max([float(jnp.finfo(jnp.result_type(value_a)).eps), *(layer.eps for layer in (*a, *b))])
    value_moved, seen_moved = sides[0].run(*_moved((params_a, rest), eps))
    moved = sides[0].layers(seen_moved)
    names = [[layer.path for layer in layers] for layers in (a, b)]
    chosen = {}
    for one, other in pairs.items():
        check.choice("diff", names[0], pairs=one)
        check.choice("diff", names[1], pairs=other)
        chosen[names[0].index(one)] = names[1].index(other)
    near = tolerance or 20 * eps
    found = paired(a, b, chosen, near)
    compared: list[Compared] = []
    for number, (left, right) in enumerate(found, 1):
        one, other, third = (beside([part[k] for k in group]) for part, group in ((a, left), (b, right), (moved, left)))
        rows = _pair(number, one, other, third, max(one.eps, other.eps), tolerance)
        if rows[0].differs and not rows[0].note:
            same = (b[k] for _, (k, *_) in found if k not in right and role(b[k]) == role(one))
            twin = next((layer for layer in same if distance(one.weight, layer.weight, near).value <= near), None)
            rows[0] = rows[0]._replace(note=f"b has it in {twin.path}: swapped?" if twin else "")
        compared += rows
    odd = {row.quantity for row in compared if row.differs}
    if odd == {"gradient"} and tolerance is None:
        jumped = sides[0].layers(sides[0].run(*_moved((params_a, rest), math.sqrt(eps)))[1])
        for number, (left, _) in enumerate(found, 1):
            pair = (beside([part[k] for k in left]).gradient.array for part in (a, jumped))
            jump = relative(*(np.asarray(array, np.float64) for array in pair))
            compared = [_jumping(row, jump, eps) if row.layer == number else row for row in compared]
    losses = _numbers("loss", value_a, value_b, value_moved, eps, tolerance)
    whole = _numbers("gradient", seen_a[WHOLE], seen_b[WHOLE], seen_moved[WHOLE], eps, tolerance)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(params)) for params in (params_a, params_b)]
    jumps = any(row.note.startswith("within its jumps") for row in compared)
    if sizes[0] != sizes[1] or jumps:
        whole = whole._replace(differs=False)  # not the same parameters, or rounding of another kind
    each = (
        () if jumps else tuple(_parameters(sides, (params_a, params_b), (seen_a, seen_b, seen_moved), eps, tolerance))
    )
    left = [tuple(names[k][i] for i in range(len(names[k])) if not any(i in pair[k] for pair in found)) for k in (0, 1)]
    alone = [tuple(one.alone) for one in sides]
    return Difference(tuple(compared), losses, whole, *left, *alone, parameters=each)


def _parameters(
    sides: tuple[Side, Side], params: Any, seen: Any, eps: float, tolerance: float | None
) -> Iterator[Compared]:
    """Compare the whole gradients of parameters: each by itself where both sides have the same, with the same numbers.

    Else, as in ports, those outside of products together, by their sorted entries.
    """
    names, leaves = [one.names for one in sides], [list(map(as_float64, jax.tree.leaves(p))) for p in params]
    grads = [list(map(as_float64, one[EACH])) for one in seen]
    near = tolerance or 20 * eps
    if names[0] == names[1] and all(
        x.shape == y.shape and relative(x, y) <= near for x, y in zip(*leaves, strict=True)
    ):
        found = list(zip(names[0], *grads, strict=True))
    else:
        chosen = [[name in one.alone for name in one.names] for one in (*sides, sides[0])]
        parts = [[g.ravel() for g, yes in zip(*pair, strict=True) if yes] for pair in zip(grads, chosen, strict=True)]
        pooled = [np.sort(np.concatenate([np.zeros(0), *part])) for part in parts]
        found = [(TOGETHER, *pooled)] if pooled[0].size == pooled[1].size > 0 else []
    whole = float(np.asarray(seen[0][WHOLE], np.float64))
    for name, x, y, moved in found:
        size = max(float(np.linalg.norm(x)), float(np.linalg.norm(y)))
        rounding = max(relative(x, moved), eps, FLOOR * eps * whole / size if size else 0)
        apart = relative(x, y)
        differs = apart > max(tolerance or 0, MARGIN * rounding)
        yield Compared(0, name, name, "gradient", apart, rounding, differs, "")


def _numbers(name: str, a: Any, b: Any, moved: Any, eps: float, tolerance: float | None) -> Both:
    """Compare a number of both sides; its six arguments are the number, and what limits it."""
    values = [float(np.asarray(value, np.float64)) for value in (a, b, moved)]
    apart, rounding = (relative(np.array(values[:1]), np.array([other])) for other in values[1:])
    rounding = max(rounding, eps)
    return Both(name, values[0], values[1], apart, rounding, apart > (tolerance or MARGIN * rounding))


def _jumping(row: Compared, jump: float, eps: float) -> Compared:
    """Let a gradient's difference count as rounding where it is no more than a jump: a ReLU near 0 that changes sides."""
    smooth = row.rounding / math.sqrt(eps)  # what the larger move gives where nothing jumps
    if row.quantity != "gradient" or not row.differs or jump < 3 * smooth or jump < row.difference:
        return row
    note = f"within its jumps where a number near 0 changes sides (ReLU, max): {jump:.1e}"
    return row._replace(differs=False, rounding=jump, note=note)


def _moved(values: Any, eps: float) -> Any:
    """Move every floating number by one unit in the last place, up or down."""
    leaves, structure = jax.tree.flatten(values)
    moved = []
    for i, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            signs = np.random.default_rng(i).integers(0, 2, leaf.shape) * 2 - 1
            leaf = leaf * jnp.asarray(1 + eps * signs, jnp.promote_types(leaf.dtype, jnp.float32))
            leaf = leaf.astype(leaves[i].dtype)
        moved.append(leaf)
    return jax.tree.unflatten(structure, moved)


def _pair(number: int, a: LayerOf, b: LayerOf, moved: LayerOf, eps: float, tolerance: float | None) -> list[Compared]:
    """Compare one pair of layers; its six arguments are the two, what rounding does to the first, and the limits."""
    floor = eps * max(1.0, math.sqrt(a.fan_in) / 16)
    found: dict[str, tuple[Distance, float, float]] = {}
    for quantity in QUANTITIES:
        x, y, z = (getattr(layer, quantity) for layer in (a, b, moved))
        if x is None or y is None or (quantity == "input" and (a.form != b.form or x.array.size != y.array.size)):
            continue  # a lookup; patches of an image, or an image that is padded already, beside the image
        rounding = (
            floor if quantity == "weight" else max(floor, relative(*(np.asarray(v.array, np.float64) for v in (x, z))))
        )
        limit = tolerance or MARGIN * rounding
        found[quantity] = distance(x, y, limit), rounding, limit
    (out, _, limit), (weight, _, exact) = found["output"], found["weight"]
    # the same entries in another order are a matter of layout if the layer's result is the same; that itself may have its
    # units in another order if the weight has
    reordered = weight.value > exact >= weight.sorted
    same = out.value <= limit or (reordered and out.sorted <= limit)
    rows = []
    for quantity, (apart, rounding, bound) in found.items():
        layout = apart.value > bound >= apart.sorted and same
        value = apart.sorted if layout else apart.value
        note = "equal up to the order of entries" if layout else ""
        if value > bound:
            note = _note(quantity, a, b, apart, bound)
        rows.append(Compared(number, a.path, b.path, quantity, value, rounding, value > bound, note))
    return rows


def _note(quantity: str, a: LayerOf, b: LayerOf, apart: Distance, bound: float) -> str:
    """Say what is striking about a difference."""
    x, y = (np.asarray(getattr(layer, quantity).array, np.float64) for layer in (a, b))
    if quantity in ("weight", "gradient"):
        x, y = (array.reshape(layer.form[1:]).squeeze() for array, layer in ((x, a), (y, b)))
    for name, array in (("a", x), ("b", y)):
        if not np.all(np.isfinite(array)):
            return f"not finite in {name}: ask fnn.watch(loss_{name}).first_bad"
    if x.size != y.size:
        return f"shapes {x.shape} and {y.shape}: only their root mean squares are compared"
    for name, one, other in (("a", x, y), ("b", y, x)):
        if not one.any() and other.any():
            return f"zero in {name}" + (": stop_gradient?" if quantity == "gradient" else "")
        zeros = [np.mean(part == 0) for part in (one, other)]
        if quantity == "input" and zeros[0] > zeros[1] + 0.05:
            return f"{zeros[0]:.0%} zeros in {name}, {zeros[1]:.0%} in the other: dropout, or another activation?"
    if quantity == "weight" and x.ndim == 2 and x.shape == y.T.shape and relative(x, y.T) <= bound:
        return "transposed"
    if x.shape == y.shape and x.any():
        ratio = float(np.vdot(x, y) / np.vdot(x, x))
        if math.isfinite(ratio) and relative(x * ratio, y) <= bound:
            return f"b is {ratio:.6g} times a"
    return "the same entries in another order" if apart.sorted <= bound else ""
