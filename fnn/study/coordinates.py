"""Coordinate checks: how the size of activations and of updates changes with width or depth, after some training steps.

A parametrisation that lets hyperparameters carry over keeps both flat (Yang et al. 2022, appendix D; Dey et al. 2025).
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import check, losses, models, parametrizations
from fnn.core import Layer
from fnn.gradients import sides
from fnn.layers import initializers
from fnn.parametrizations import Parametrization
from fnn.study import nets
from fnn.study.options import Source, arrays
from fnn.study.program import OPTIMIZERS, classes
from fnn.study.quantiles import quantile
from fnn.tasks import ExampleFunction
from fnn.training.optimizers import parametrized, per_depth

if TYPE_CHECKING:
    import polars
    from matplotlib.figure import Figure

AXES = ("width", "depth")
ADAPTIVE = ("adam", "adamw", "rmsprop", "lamb")
"""Optimisers that divide by the size of gradients."""
ROLES = ("input", "hidden", "output")
QUANTITIES = ("log10_activation", "log10_update")


class Slope(NamedTuple):
    """How a quantity changes with the axis: d log10(quantity) / d log10(width or depth), with its 95 % interval."""

    parametrization: str
    role: str
    quantity: str
    slope: float
    low: float
    high: float


class Check(NamedTuple):
    """What a coordinate check measured."""

    axis: str
    steps: int
    table: "polars.DataFrame"
    """polars: parametrization, the axis, seed, layer, path, role, quantity, value. `log10_activation` is of the root mean
    square of a layer's outputs, `log10_update` of what all updates of its kernel so far change them by, at its inputs of
    now."""

    def slopes(self) -> list[Slope]:
        """Fit a line for each parametrisation, role and quantity; the hidden layers of a net count as their mean.

        The interval is Student's, over the slopes of single seeds; infinite for one seed.
        """
        import polars as pl
        from scipy.special import stdtrit

        keys = ["parametrization", "role", "quantity"]
        one = self.table.group_by(*keys, "seed", self.axis, maintain_order=True).agg(pl.col("value").mean())
        found = []
        for key, rows in one.group_by(keys, maintain_order=True):
            fits = []
            for _, run in rows.group_by("seed", maintain_order=True):
                x, y = np.log10(run[self.axis].to_numpy()), run["value"].to_numpy()
                fits.append(np.sum((x - x.mean()) * y) / np.sum((x - x.mean()) ** 2))
            n, mean = len(fits), float(np.mean(fits))
            reach = float(stdtrit(n - 1, 0.975) * np.std(fits, ddof=1) / math.sqrt(n)) if n > 1 else math.inf
            found.append(Slope(*map(str, key), slope=mean, low=mean - reach, high=mean + reach))
        return found

    def figure(self) -> "Figure":
        """Draw both quantities against the axis, logarithmic: a column for each parametrisation, a line for each role."""
        import polars as pl
        from matplotlib.figure import Figure

        from fnn.plot import COLOURS, MARKERS

        names = self.table["parametrization"].unique(maintain_order=True).to_list()
        figure = Figure(figsize=(2.9 * len(names) + 0.8, 5.0), layout="constrained")
        axes = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
        titles = {"log10_activation": r"$\log_{10}$ RMS of $h$", "log10_update": r"$\log_{10}$ RMS of $\Delta W\,x$"}
        slopes = {s[:3]: s for s in self.slopes()}
        for i, quantity in enumerate(QUANTITIES):
            axes[i, 0].set_ylabel(titles[quantity])
            for j, name in enumerate(names):
                part = self.table.filter((pl.col("parametrization") == name) & (pl.col("quantity") == quantity))
                for k, role in enumerate(ROLES):
                    seeds = part.filter(pl.col("role") == role).group_by("seed", self.axis).agg(pl.col("value").mean())
                    if seeds.is_empty():
                        continue
                    value = pl.col("value")
                    lines = seeds.group_by(self.axis).agg(
                        value=quantile(value, 0.5), low=quantile(value, 0.1), high=quantile(value, 0.9)
                    )
                    lines = lines.sort(self.axis)
                    x, slope = lines[self.axis].to_numpy(), slopes[name, role, quantity]
                    text = f"{role}: {slope.slope:+.2f} [{slope.low:+.2f}, {slope.high:+.2f}]"
                    axes[i, j].fill_between(x, lines["low"], lines["high"], color=COLOURS[k], alpha=0.2, linewidth=0)
                    axes[i, j].plot(
                        x,
                        lines["value"],
                        color=COLOURS[k],
                        marker=MARKERS[k],
                        markersize=3.5,
                        linewidth=1.2,
                        label=text,
                    )
                axes[i, j].set_xscale("log", base=2)
                axes[i, j].legend(fontsize=7, frameon=False, title="slope, 95 % interval", title_fontsize=7)
                axes[0, j].set_title(name, fontsize=9)
                axes[1, j].set_xlabel(self.axis)
        seeds = self.table["seed"].n_unique()
        figure.suptitle(f"after {self.steps} steps; medians of {seeds} seeds, 10th to 90th percentile", fontsize=9)
        return figure


def mlp(
    width: int = 64,
    depth: int = 4,
    activation: str = "tanh",
    norm: str = "none",
    residual: bool = False,
    parametrization: str | Parametrization = "standard",
    classes: int = 10,
) -> Layer:
    """Build the net that is checked by default: weights from N(0, 2/fan_in) for ReLU, 1/fan_in in residual nets.

    Its arguments are those of `models.mlp`.
    """
    init = "he_normal" if activation == "relu" and not residual else initializers.scaled(1.0)
    options = {"activation": activation, "norm": norm, "init": init, "unroll": 1}
    return models.mlp(depth, width, classes, residual=residual, parametrization=parametrization, **options)


def coordinate_check(
    axis: str,
    values: Sequence[int],
    *,
    parametrization: Sequence[str | Parametrization] = ("standard", "mup"),
    build: Callable[..., nets.Built] = mlp,
    options: Mapping[str, Any] | None = None,
    steps: int = 3,
    seeds: int = 4,
    optimizer: str = "adam",
    learning_rate: float = 1e-2,
    batch_size: int = 32,
    data: Source = "digits",
    loss: ExampleFunction = losses.cross_entropy,
) -> Check:
    """Train nets of several widths or depths for some steps, and measure what each layer puts out and what updates change.

    `axis` is "width" or "depth", an argument of `build`, like the `options`, which stay the same. `build` returns what
    that of a study does: a Layer, or a pair (init, loss) of any framework. If it has an argument `parametrization`, it
    gets each one in turn; the optimiser is always that of `optimizers.parametrized`, where the first and the last kernel
    in the order of the parameters are input and output. Each step has its own batch; the first batch is measured.

    Layers are the products of data with one kernel that `fnn.watch` finds; updates are measured for plain kernels (not for
    convolutions and lookups). The options are keywords since they are those of `fnn study --check`.
    Errors: ValueError for an axis that build does not have, fewer than two values, and an unknown parametrisation.
    """
    import polars as pl

    check.choice("coordinate_check", AXES, axis=axis)
    check.choice("coordinate_check", OPTIMIZERS, optimizer=optimizer)
    check.positive(
        "coordinate_check", steps=steps, seeds=seeds, batch_size=batch_size, **{f"{axis}_{v}": v for v in values}
    )
    check.above_zero("coordinate_check", learning_rate=learning_rate)
    if len(set(values)) < 2:
        raise ValueError(
            f"coordinate_check: {axis} must have at least two values, got {list(values)}; a slope needs them"
        )
    arguments = inspect.signature(build).parameters
    if missing := [name for name in (axis, *(options or {})) if name not in arguments]:
        raise ValueError(
            f"coordinate_check: build must have the argument {missing[0]}, got {', '.join(arguments)}; add it"
        )
    train = arrays(data)[0]
    x, y = np.asarray(train.x), np.asarray(train.y)
    made = _Made(build, loss, optimizer, learning_rate)
    rows: list[tuple[Any, ...]] = []
    orders = [np.random.default_rng(seed).permutation(len(x)) for seed in range(seeds)]
    taken = np.stack([np.resize(order, (steps + 1) * batch_size) for order in orders])
    taken = taken.reshape(seeds, steps + 1, batch_size)
    for chosen in map(parametrizations.get, parametrization):
        for value in values:
            given: dict[str, Any] = {"classes": classes(train)} if "classes" in arguments else {}
            given |= {**(options or {}), axis: int(value)}
            given |= {"parametrization": chosen} if "parametrization" in arguments else {}
            depth = int(given.get("depth", arguments["depth"].default if "depth" in arguments else 1))
            for seed, pair in enumerate(made.layers(given, chosen, depth, (x[taken], y[taken]))):
                rows += [(chosen.name, int(value), seed, *row) for row in _rows(*pair)]
    schema = ["parametrization", axis, "seed", "layer", "path", "role", "quantity", "value"]
    return Check(axis, steps, pl.DataFrame(rows, schema=schema, orient="row"))


class _Made(NamedTuple):
    """How nets are made and trained."""

    build: Callable[..., Any]
    loss: Callable[[Any, Any], Any]
    optimizer: str
    rate: float

    def layers(
        self, given: dict[str, Any], chosen: Parametrization, depth: int, batches: tuple[np.ndarray, np.ndarray]
    ) -> Iterator[tuple[list[sides.LayerOf], list[sides.LayerOf]]]:
        """Train a net for each seed, all in one program; give its layers before and after, on the first batch.

        Batches are [seeds, steps + 1, batch, ...].
        """
        net = nets.made(self.build(**given), self.loss, ())
        adaptive = self.optimizer in ADAPTIVE
        tx = per_depth(parametrized(OPTIMIZERS[self.optimizer](self.rate), chosen, adaptive=adaptive, depth=depth))
        key = jax.random.key(0)

        def value(params, state, x, y):
            return net.value(params, state, (x, y), key)

        def step(state, carry, batch):
            params, inner = carry
            updates, inner = tx.update(jax.grad(value)(params, state, *batch), inner, params)
            return (optax.apply_updates(params, updates), inner), None

        first = jax.tree.map(lambda a: a[0, 0], batches)
        specs = jax.eval_shape(lambda x: net.init(key, x), first[0])
        side = sides.side("the loss", value, specs[0], (specs[1], *first), backward=False)

        def one(seed, x, y):
            params, state = net.init(jax.random.key(seed), x[0])
            (trained, _), _ = jax.lax.scan(functools.partial(step, state), (params, tx.init(params)), (x[1:], y[1:]))
            both = jax.tree.map(lambda *pair: jnp.stack(pair), params, trained)
            return jax.lax.map(lambda p: side.run(p, (state, x[0], y[0]))[1], both)

        seen = jax.device_get(jax.jit(jax.vmap(one))(np.arange(len(batches[0])), *batches))
        for seed in range(len(batches[0])):
            before, after = (side.layers({name: a[seed, time] for name, a in seen.items()}) for time in (0, 1))
            yield before, after


def _rows(before: Sequence[sides.LayerOf], after: Sequence[sides.LayerOf]) -> list[tuple[Any, ...]]:
    """List layer, path, role, quantity and value of each layer."""
    rows = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        role = "input" if i == 0 else "output" if i + 1 == len(after) else "hidden"
        found = {"log10_activation": new.output.array}
        change = new.weight.array.astype(np.float64) - old.weight.array
        if new.input is not None and new.input.units is not None and new.form[:2] == (1, 1):
            axes = list(range(len(new.input.units)))
            found["log10_update"] = np.tensordot(new.input.array, change, (list(new.input.units), axes))
        with np.errstate(divide="ignore"):
            rows += [
                (i + 1, new.path, role, name, float(np.log10(np.mean(np.square(a, dtype=np.float64))) / 2))
                for name, a in found.items()
            ]
    return rows
