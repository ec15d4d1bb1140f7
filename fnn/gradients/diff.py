"""`diff`: where do two losses begin to differ, layer by layer, forward and backward? For ports and refactorings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arrays, check, compiled
from fnn.gradients.pairing import Distance, beside, distance, paired, relative, role
from fnn.gradients.sides import LayerOf, side

QUANTITIES = ("weight", "input", "output", "gradient")
MARGIN = 5.0
"""How many times what rounding gives a difference must be, so that it counts."""


class Compared(NamedTuple):
    """One quantity of one pair of layers."""

    layer: int
    """In forward order, from 1 on."""
    path_a: str
    path_b: str
    quantity: str
    """"weight", "input", "output" or "gradient" (of the weight)."""
    difference: float
    """|a - b| / max(|a|, |b|), Frobenius, in the layout in which both agree best."""
    rounding: float
    """What rounding would give."""
    differs: bool
    note: str


@dataclass(frozen=True)
class Difference:
    """What `fnn.diff(loss_a, loss_b)(params_a, params_b, batch)` returns: `print` it, or read `rows()` and `table()`."""

    compared: tuple[Compared, ...]
    loss_a: float
    loss_b: float
    loss_rounding: float
    loss_differs: bool
    unpaired_a: tuple[str, ...]
    """Layers of the first loss that have no partner."""
    unpaired_b: tuple[str, ...]
    alone_a: tuple[str, ...]
    """Parameters that are no factor of a product (biases, scales of norms): seen only by what they do to outputs."""
    alone_b: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether all layers have partners and nothing differs by more than rounding."""
        differs = self.loss_differs or any(row.differs for row in self.compared)
        return not (differs or self.unpaired_a or self.unpaired_b)

    @property
    def first_forward(self) -> int | None:
        """The first layer at which weights or forward values differ; None if none does."""
        return next((row.layer for row in self.compared if row.differs and row.quantity != "gradient"), None)

    @property
    def first_backward(self) -> int | None:
        """The first layer, from the output backwards, whose weight's gradient differs; None if none does."""
        return next((row.layer for row in self.compared[::-1] if row.differs and row.quantity == "gradient"), None)

    @property
    def verdict(self) -> str:
        """One sentence: equal, or where the difference begins and what it is."""
        return _verdict(self)

    def rows(self) -> list[Compared]:
        """List everything that was compared, in forward order."""
        return list(self.compared)

    def table(self) -> Any:
        """Make a polars DataFrame with the columns of `Compared`: layer, path_a, path_b, quantity, difference, ..."""
        import polars as pl

        kinds = (pl.Int64, pl.String, pl.String, pl.String, pl.Float64, pl.Float64, pl.Boolean, pl.String)
        schema = dict(zip(Compared._fields, kinds, strict=True))
        return pl.DataFrame([row._asdict() for row in self.compared], schema=schema)

    def __str__(self) -> str:
        layers: dict[int, dict[str, Compared]] = {}
        for row in self.compared:
            layers.setdefault(row.layer, {})[row.quantity] = row
        head = ["layer", "a", "b", *QUANTITIES]
        lines = [head]
        for layer, found in layers.items():
            first = next(iter(found.values()))
            cells = [_cell(found.get(quantity)) for quantity in QUANTITIES]
            lines.append([str(layer), first.path_a, first.path_b, *cells])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [self.verdict, f"loss: {self.loss_a:.8g} and {self.loss_b:.8g}"]
        if layers:
            text += [
                "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in lines
            ]
            text.append("relative differences; * above what rounding gives")
        notes = dict.fromkeys(f"layer {row.layer}, {row.quantity}: {row.note}" for row in self.compared if row.note)
        text += notes
        for name, paths in (("a", self.unpaired_a), ("b", self.unpaired_b)):
            text += [f"without a partner, {name}: {', '.join(paths)}"] if paths else []
        return "\n".join(text)


def diff(
    loss_a: Callable[..., Any],
    loss_b: Callable[..., Any],
    *,
    pairs: Mapping[str, str] | None = None,
    tolerance: float | None = None,
) -> Callable[..., Difference]:
    """Make `(params_a, params_b, *batch) -> Difference`: where two losses begin to differ, layer by layer, |a - b| / max(|a|, |b|).

    Both are `loss(params, *batch) -> float[]` of any framework, and get the same batch. Layers are products of data with a
    weight, found in the traced losses, loops over layers written out. They are paired in forward order by the sizes of
    their weights by role (in, out, positions of a kernel), whatever the layout: in x out or out x in, heads split or merged,
    channels first or last; one that stands for several with the same input (queries, keys and values; gates) with these. Of parallel layers, such as queries and keys, those of equal weights are paired. `pairs={path_a:
    path_b}` overrides; paths are those in the table.

    For each pair its weight, input, output (with the bias, if one follows) and gradient of the weight are compared. Where
    the order of axes is not known, the order in which both agree best counts. Where only the order of entries differs and
    the layer's output is the same (a flattened image, channels first or last), it is a matter of layout, and the note says so.

    A difference counts if it is larger than 5 times what rounding gives: the change when every parameter and input of
    `loss_a` is moved by one unit in the last place, or eps·max(1, √fan_in / 16), whichever is larger; or larger than
    `tolerance`. Products are computed with full precision (`jax.default_matmul_precision("highest")`).

    All values of both losses are held in memory. For the host.
    Errors: TypeError for traced arrays; ValueError for unknown paths in `pairs`, and for a loss that is no single float.

        print(fnn.diff(linen_loss, equinox_loss)(linen_params, equinox_params, batch))
    """
    for name, loss in (("loss_a", loss_a), ("loss_b", loss_b)):
        if not callable(loss):
            raise TypeError(f"diff: {name} must be a function (params, batch) -> float[], got {type(loss).__name__}")
    if tolerance is not None:
        check.above_zero("diff", tolerance=tolerance)

    def compare(params_a: Any, params_b: Any, *batch: Any) -> Difference:
        if compiled.traced((params_a, params_b, batch)):
            raise TypeError(
                "diff: it decides on the host, got traced arrays; call it outside of jit, grad, vmap and scan"
            )
        for params in (params_a, params_b):
            check.parameters("diff", params)
            check.alive("diff", params)
        rest = tuple(arrays.arrays("diff", "the batch", part) for part in batch)
        with jax.default_matmul_precision("highest"):
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
    losses = [float(np.asarray(value, np.float64)) for value in (value_a, value_b, value_moved)]
    apart, rounding = (relative(np.array(losses[:1]), np.array([other])) for other in losses[1:])
    rounding = max(rounding, eps)
    left = [tuple(names[k][i] for i in range(len(names[k])) if not any(i in pair[k] for pair in found)) for k in (0, 1)]
    return Difference(
        tuple(compared),
        losses[0],
        losses[1],
        rounding,
        apart > (tolerance or MARGIN * rounding),
        *left,
        *(tuple(s.alone) for s in sides),
    )


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


def _cell(row: Compared | None) -> str:
    return "-" if row is None else f"{row.difference:.1e}{' *' if row.differs else ''}"


def _verdict(found: Difference) -> str:
    missing = sum(map(len, (found.unpaired_a, found.unpaired_b)))
    rest = f"; {missing} layers have no partner" if missing else ""
    if not found.compared:
        return "nothing to compare: no layers could be paired" + rest
    first, last = found.first_forward, found.first_backward
    if first is not None:
        return _forward(found, first) + rest
    if last is not None:
        rows = {row.quantity: row for row in found.compared if row.layer == last}
        row, layers = rows["gradient"], found.compared[-1].layer
        start = "the last layer" if last == layers else f"layer {last} of {layers}, counted from the output"
        note = f" ({row.note})" if row.note else ""
        losses = (
            "; the losses differ too: what follows the last layer computes something else" if found.loss_differs else ""
        )
        return (
            f"forward values are equal to rounding; gradients differ from {start} on: of {_name(row)} by "
            f"{row.difference:.2g} (rounding: {row.rounding:.1g}){note}{losses}{rest}"
        )
    if found.loss_differs:
        return f"all layers are equal to rounding, the losses are not: what follows the last layer computes something else{rest}"
    return f"{'what was paired is ' if missing else ''}equal to rounding{rest}"


def _forward(found: Difference, first: int) -> str:
    rows = {row.quantity: row for row in found.compared if row.layer == first}
    before = [row for row in found.compared if row.layer == first - 1]
    differs = [
        rows[quantity] for quantity in ("weight", "input", "output") if quantity in rows and rows[quantity].differs
    ]
    row = differs[0]
    words = {"weight": "the weight", "input": "the input", "output": "the output"}[row.quantity]
    start = (
        f"differs from layer {first} on: {words} of {_name(row)} by {row.difference:.2g} (rounding: {row.rounding:.1g})"
    )
    note = f" ({row.note})" if row.note else ""
    if row.quantity == "weight":
        return start + note
    if row.quantity == "input":
        what = "the batch is prepared differently" if not before else f"what lies between {before[0].path_a} and it"
        why = "" if not before else " computes something else (activation? norm or its epsilon? dropout? a sum?)"
        return f"{start}{note}; all before it is equal: {what}{why}"
    known = "its weights are equal, its inputs are equal" if "input" in rows else "its weights are equal"
    return f"{start}{note}; {known}: the layer computes something else (bias? scale? padding? precision?)"


def _name(row: Compared) -> str:
    return row.path_a if row.path_a == row.path_b else f"{row.path_a} ({row.path_b})"
