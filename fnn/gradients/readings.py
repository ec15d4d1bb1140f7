"""What `watch` returns: numbers with labels, as a pytree; tables, figures and flat names of them on the host."""

import fnmatch
import functools
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import check, compiled

if TYPE_CHECKING:
    import polars
    from matplotlib.figure import Figure

LOG2 = math.log10(2)
LEAST = -28.0
"""log10 of a norm below which a plain float32 gradient may have lost part of it."""
BACKWARD = {"log10_gradient", "log10_gradient_rms", "log10_error", "log10_error_norm", "log10_gradient_to_weight"}
NORMS = BACKWARD - {"log10_gradient_to_weight"}
"""Infinite only by mistake: a gradient beside a weight of zero is so in truth."""
UNMEASURED = -(2**31)
"""The exponents of a flow of a step at which nothing was measured."""
MOMENTS = ("input_second_moment", "input_dead", "output_second_moment")


@dataclass(frozen=True)
class Series:
    """The label of one quantity of one array: a number, or one for each turn of the loops over layers around it."""

    quantity: str
    """"" marks a layer of which this says nothing but its place."""
    path: str
    lengths: tuple[int, ...]
    """Of the loops over layers."""
    order: tuple[int | None, ...]
    """The place in the program: numbers of operations; None stands for a turn, in the order of `turns`."""
    turns: tuple[tuple[int | None, bool], ...]
    """For each None in `order`: which of `lengths` it is (None for a loop over time), and whether it runs backwards."""
    starts: bool
    """Whether a layer begins here: a product with a parameter."""
    heads: int = 0
    """Of attention: how many numbers stand side by side."""
    recurrent: bool = False
    shift: float = 0.0
    """What is added to a log10."""

    @property
    def size(self) -> int:
        return math.prod(self.lengths) * max(1, self.heads) if self.quantity else 0


class Row(NamedTuple):
    """One number of one layer."""

    layer: int
    """Counted from the input, 1 being the first; 0 for what comes before it."""
    path: str
    quantity: str
    value: float


class Labels:
    """The labels of a `Flow`; equal where they say the same. Hashed once, since JAX compares them at every call."""

    def __init__(self, series: tuple[Series, ...], notes: tuple[str, ...], exact: bool = True):
        self.series, self.notes, self.exact = series, notes, exact
        self._hash = hash((series, notes, exact))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Labels):
            return False
        return (self.notes, self.exact, self.series) == (other.notes, other.exact, other.series)

    @functools.cached_property
    def rows(self) -> list[tuple[int, str, str, int, float]]:
        """List (layer, path, quantity, index of the number, shift) in forward order."""
        return [row[:5] for row in _rows(self.series) if row[2]]

    @functools.cached_property
    def starts(self) -> list[tuple[int, str]]:
        """List (layer, path) of the weights that begin a layer."""
        return list(dict.fromkeys(row[:2] for row in _rows(self.series) if row[5]))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["loss", "mantissas", "exponents"], meta_fields=["labels"]
)
@dataclass(frozen=True, repr=False)
class Flow:
    """Measured numbers of a loss and its gradient, layer by layer: what `fnn.watch(loss)(params, batch)` returns.

    A pytree with static labels: return it from `jit`, stack it by `scan` or `vmap`, read it on the host. `print` shows the
    layers; `table()` has the columns layer, path, quantity and value (and `lane` if the flow was made under `vmap` or
    `scan`); `flat()` is a dict for loggers; `plot()` draws; `select` and `worst` pick rows.

    | group | quantity | of | what |
    |---|---|---|---|
    | gradient | log10_gradient | every array | log10 of the Frobenius norm of the mean loss's gradient |
    | | log10_gradient_rms | every array | the same of the root mean square of its entries |
    | error | log10_error | layers | log10 of the RMS over examples of |d l_i/dh|, h the layer's output |
    | activation | input_mean, input_second_moment, input_dead | layers | E[x], E[x²], fraction of units that are 0 for the whole batch, at all positions |
    | | output_mean, output_second_moment, output_dead | layers | the same of the output, with its bias |
    | kurtosis | input_kurtosis, output_kurtosis | layers | E[(x - m)⁴] / E[(x - m)²]²; 3 for a Gaussian |
    | saturated | input_saturated | layers after tanh or logistic | fraction within 1 % of the range of a bound |
    | rank | input_rank, output_rank | layers | (tr G)² / tr G² of the Gram matrix of all positions: from 1 to the number of units |
    | cosine | cosine, log10_gradient_to_weight | every array | cosine of gradient and array; log10 of |g| / |w| |
    | attention | largest_logit, attention_entropy | heads | largest number that goes into the softmax; mean entropy, in nats |

    A unit is an index of the weight's free axis (a channel); all other axes are positions. A stack of layers (`scan`) has a
    row for each, `blocks[3]/kernel`. A log10 of -inf is a gradient of zero; NaN is a number that is not finite, or a step
    that was not measured. What does not apply is absent, not 0: so is the error signal of a layer behind frozen ones alone.
    """

    loss: jax.Array
    mantissas: jax.Array
    """float32[..., n]; number i is mantissas[i] · 2^exponents[i]."""
    exponents: jax.Array
    """int32[..., n]"""
    labels: Labels

    def numbers(self) -> np.ndarray:
        """Give all numbers in the order of `labels.rows`, logs as log10: float64[..., n]. Errors: TypeError inside `jit`."""
        if compiled.traced((self.loss, self.mantissas)):
            raise TypeError(
                "flow: tables, figures and prints are made on the host, got a flow of traced arrays; return it from the "
                "jitted function first"
            )
        m, e = np.asarray(jax.device_get(self.mantissas), np.float64), np.asarray(jax.device_get(self.exponents))
        rows = self.labels.rows
        index = np.array([row[3] for row in rows], int)
        logs = np.array([row[2].startswith("log10_") for row in rows], bool)
        shift = np.array([row[4] for row in rows])
        m, e = m[..., index], e[..., index].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            plain = m * np.exp2(e)
            log = np.log10(m) + e * LOG2 + shift
            log = np.where(np.isinf(m) & np.array([row[2] in NORMS for row in rows], bool), np.nan, log)
        if not self.labels.exact:
            log = _in_doubt(log, np.array([row[2] in BACKWARD for row in rows], bool))
        return np.where(logs, log, plain)

    def backward_is_finite(self) -> bool:
        """Whether each number of the way back is one, or the log of a zero."""
        if np.isfinite(np.asarray(self.mantissas)).all():
            return True
        numbers = zip(self.labels.rows, self.numbers(), strict=True)
        return not any(np.isnan(value) for row, value in numbers if row[2] in NORMS)

    def rows(self) -> list[Row]:
        """List all numbers in forward order. Errors: ValueError for a flow of several lanes; see `table`."""
        values = self.numbers()
        if values.ndim != 1:
            raise ValueError(
                f"flow.rows: a flow of several lanes has no single list, got lanes {values.shape[:-1]}; use table(), or "
                "jax.tree.map(lambda a: a[0], flow)"
            )
        return [
            Row(layer, path, quantity, float(value))
            for (layer, path, quantity, _, _), value in zip(self.labels.rows, values, strict=True)
        ]

    def table(self) -> "polars.DataFrame":
        """Make a polars DataFrame with the columns layer, path, quantity and value; before them `lane`, if there are several.

        Several mapped axes are numbered through, the last one fastest.
        """
        import polars as pl

        values, rows = self.numbers(), self.labels.rows
        lanes = int(np.prod(values.shape[:-1]))
        columns = {"layer": [r[0] for r in rows], "path": [r[1] for r in rows], "quantity": [r[2] for r in rows]}
        columns = {name: column * lanes for name, column in columns.items()}
        if values.ndim > 1:
            columns = {"lane": np.repeat(np.arange(lanes), len(rows))} | columns
        return pl.DataFrame(columns | {"value": values.reshape(-1)})

    def flat(self) -> dict[str, float]:
        """Make a dict for loggers: `{"path/quantity": number}`, and `"loss"`. Errors: ValueError for several lanes."""
        return {"loss": float(self.loss)} | {f"{row.path}/{row.quantity}": row.value for row in self.rows()}

    def select(self, only: str = "*", quantity: str = "*") -> "list[Row]":
        """List the rows whose path and quantity match patterns of `fnmatch`, in forward order.

        flow.select("*/attention/*", "log10_*")
        """
        return [
            row
            for row in self.rows()
            if fnmatch.fnmatchcase(row.path, only) and fnmatch.fnmatchcase(row.quantity, quantity)
        ]

    def worst(self, k: int = 5, quantity: str = "log10_gradient") -> list[Row]:
        """List the k rows of a quantity that lie farthest from its median, not finite ones first.

        Errors: ValueError for a quantity that was not measured.
        """
        check.positive("flow.worst", k=k)
        check.choice("flow.worst", dict.fromkeys(row[2] for row in self.labels.rows), quantity=quantity)
        rows = self.select(quantity=quantity)
        finite = [row.value for row in rows if math.isfinite(row.value)]
        middle = float(np.median(finite)) if finite else 0.0
        return sorted(rows, key=lambda row: -abs(row.value - middle) if math.isfinite(row.value) else -math.inf)[:k]

    def profile(self, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (layers, values) of a quantity; of several rows of a layer the first in forward order."""
        first: dict[int, float] = {}
        for row in self.rows():
            if row.quantity == quantity:
                first.setdefault(row.layer, row.value)
        return np.array(list(first), int), np.array(list(first.values()))

    def weights(self, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (layers, values) of a quantity of the weights that begin a layer: biases and gains are left out."""
        paths, found = dict(reversed(self.labels.starts)), {}
        for row in self.rows():
            if row.quantity == quantity and paths.get(row.layer) == row.path:
                found.setdefault(row.layer, row.value)
        return np.array(list(found), int), np.array(list(found.values()))

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draw log10 of error signal and gradient, and of the RMS of inputs and outputs, against the layer: a matplotlib figure.

        Saved as well if given a path. Errors: ValueError if none of these was measured.
        """
        from fnn.gradients import drawing

        return drawing.profiles(self, path)

    def __repr__(self) -> str:
        loss = "traced" if compiled.traced(self.loss) else np.asarray(self.loss)
        return f"Flow(loss={loss}, {len(self.labels.rows)} numbers of {len(self.labels.starts)} layers)"

    def __str__(self) -> str:
        if compiled.traced(self.loss) or np.ndim(self.loss):
            return f"{self!r}: print shows one flow on the host; see table()"
        names = ("log10_error", "log10_error_norm", "log10_gradient", *MOMENTS)
        columns = {name: dict(zip(*self.weights(name), strict=True)) for name in names}
        paths = dict(reversed(self.labels.starts))
        columns = {name: column for name, column in columns.items() if column}
        shown: list[int | None] = sorted(paths)  # type: ignore[assignment]
        if len(shown) > 24:
            shown = [*shown[:12], None, *shown[-12:]]
        wide = min(40, max([5, *(len(paths[layer]) for layer in shown if layer)]))
        lines = [*self.labels.notes, f"loss {float(self.loss):.6g}"]
        if not paths:
            lines.append(
                "no layers among these parameters, that is, no products of one with data; see table(), explain()"
            )
            return "\n".join(lines)
        lines.append(f"{'layer':>5}  {'path':{wide}}  " + "  ".join(f"{name:>{max(9, len(name))}}" for name in columns))
        for layer in shown:
            if layer is None:
                lines.append(f"  ... {len(paths) - 24} more")
                continue
            path = paths[layer] if len(paths[layer]) <= wide else "…" + paths[layer][1 - wide :]
            widths = {name: max(9, len(name)) for name in columns}
            cells = (f"{c[layer]:{widths[n]}.4g}" if layer in c else " " * widths[n] for n, c in columns.items())
            lines.append(f"{layer:5d}  {path:{wide}}  " + "  ".join(cells))
        more = dict.fromkeys(row[2] for row in self.labels.rows if row[2] not in columns)
        lines += [f"in table() too: {', '.join(more)}, and biases and scales"] if more else []
        if np.all(np.asarray(self.exponents) == UNMEASURED):
            lines.append("not measured at this step")
        elif not np.isfinite(self.loss):
            lines.append(
                "the loss is not finite: watch(loss).first_bad(params, batch) says which operation makes it so"
            )
        return "\n".join(lines)


def _in_doubt(logs: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Make NaN of what float32 may have lost on the way back: numbers near its end, and zeros behind such numbers."""
    values = np.where(backward, logs, np.nan)
    with np.errstate(invalid="ignore"):
        small = values < LEAST
        near = np.isfinite(values) & (values < LEAST + 8)
    lost = small & (np.isfinite(values) | np.any(near, axis=-1, keepdims=True))
    return np.where(lost, np.nan, logs)


def _rows(series: tuple[Series, ...]) -> Iterator[tuple[int, str, str, int, float, bool]]:
    starts = np.cumsum([0, *(s.size for s in series)])
    every = [
        (_key(s, turn), not s.starts, i, turn, head)
        for i, s in enumerate(series)
        for turn in itertools.product(*map(range, s.lengths))
        for head in range(max(1, s.heads))
    ]
    layer, known = 0, {}
    for key, _, i, turn, head in sorted(every, key=lambda row: (row[0], row[2], row[4])):
        s = series[i]
        path = _named(s.path, turn)
        if s.starts:
            # The products of one recurrent cell belong to one layer.
            own = (path.rpartition("/")[0], turn) if s.recurrent else (key, path)
            if own not in known:
                layer += 1
                known[own] = layer
        place = known.get(own, layer) if s.starts else layer
        index = int(starts[i]) + int(np.ravel_multi_index(turn, s.lengths) if turn else 0) * max(1, s.heads) + head
        yield place, path + (f"[head {head}]" if s.heads else ""), s.quantity, index, s.shift, s.starts


def _key(s: Series, turn: tuple[int, ...]) -> tuple[int, ...]:
    turns = iter(s.turns)

    def number(part):
        if part is not None:
            return part
        axis, backwards = next(turns)
        return 0 if axis is None else s.lengths[axis] - 1 - turn[axis] if backwards else turn[axis]

    return tuple(number(part) for part in s.order)


def _named(path: str, turn: tuple[int, ...]) -> str:
    for i in turn:
        path = path.replace("[:]", f"[{i}]", 1) if "[:]" in path else f"{path}[{i}]"
    return path


def empty(flow: Flow) -> Flow:
    """Make a flow of the same form (of arrays or their specs) whose numbers are NaN."""

    def full(a):
        return np.full(a.shape, np.nan if jnp.issubdtype(a.dtype, jnp.floating) else UNMEASURED, a.dtype)

    return jax.tree.map(full, flow)


def noted(flow: Flow, note: str) -> Flow:
    """Return the flow with one note more."""
    labels = Labels(flow.labels.series, (*flow.labels.notes, note))
    return Flow(flow.loss, flow.mantissas, flow.exponents, labels)
