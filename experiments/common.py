"""What every experiment shares: its command line, its table of verdicts, and the manner of its figures.

An experiment is one file with one question:

    def run(options) -> Result          # checks (predicted, measured, tolerance), a figure, remarks

    if __name__ == "__main__":
        common.main(__file__, __doc__, run)

`python experiments/NAME.py` prints the table, writes `NAME.png`, and puts the table into `VERDICTS.md` beside it.
"""

import argparse
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import fnn
from fnn.gradients import flow
from fnn.plot import COLOURS, MARKERS

HERE = Path(__file__).parent
LIMIT = 300_000  # bytes of a figure
HEADINGS = ("quantity", "predicted", "measured", "tolerance", "verdict")
ABOUT = """# Verdicts

One section for each file of this folder: what was predicted, what was measured, how far apart they may lie. Each
`python experiments/NAME.py` replaces its own section by what it has just measured."""


class Options(NamedTuple):
    """What the command line says."""

    tiny: bool
    """Few seeds and layers, wider tolerances: seconds instead of a minute, to see that the experiment runs."""
    out: Path
    """Folder for the figure and for VERDICTS.md."""

    def pick(self, full: Any, tiny: Any) -> Any:
        """Choose a size: `depth = options.pick(100, 10)`."""
        return tiny if self.tiny else full


class Check(NamedTuple):
    """One line of the table of verdicts; made by `close`, `at_least` and `at_most`."""

    quantity: str
    predicted: str
    measured: str
    tolerance: str
    holds: bool


def close(quantity: str, predicted: float, measured: float, tolerance: float, *, relative: bool = False) -> Check:
    """Check |measured - predicted| <= tolerance, or tolerance·|predicted| if `relative`; NaN never holds."""
    bound = tolerance * abs(predicted) if relative else tolerance
    shown = f"{100 * tolerance:.3g} %" if relative else f"± {tolerance:.3g}"
    return Check(quantity, _number(predicted), _number(measured), shown, bool(abs(measured - predicted) <= bound))


def at_least(quantity: str, bound: float, measured: float) -> Check:
    """Check measured >= bound."""
    return Check(quantity, f"≥ {_number(bound)}", _number(measured), "one-sided", bool(measured >= bound))


def at_most(quantity: str, bound: float, measured: float) -> Check:
    """Check measured <= bound."""
    return Check(quantity, f"≤ {_number(bound)}", _number(measured), "one-sided", bool(measured <= bound))


@dataclass(frozen=True)
class Result:
    """What an experiment found."""

    checks: Sequence[Check]
    figure: Any
    remarks: Sequence[str] = ()
    """Sentences: the setting, n, and how often a check may fail by chance."""


def main(file: str, doc: str, run: Callable[[Options], Result], arguments: Sequence[str] | None = None) -> int:
    """Run an experiment from the command line; return 0 if every verdict holds, else 1 (2 for bad input)."""
    name, options = Path(file).stem, parse(doc, arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        result = run(options)
        seconds = time.perf_counter() - started
        save(result.figure, options.out / f"{name}.png")
        section = "\n".join(describe(name, doc, result, options, seconds))
        record(options.out / "VERDICTS.md", name, section)
    except OSError as error:
        print(f"{name}: cannot write to {options.out}: {error.strerror}; choose another --out", file=sys.stderr)
        return 2
    print(section)
    return 0 if all(check.holds for check in result.checks) else 1


def parse(doc: str, arguments: Sequence[str] | None = None) -> Options:
    """Read `--tiny` and `--out FOLDER`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small version that takes seconds")
    parser.add_argument("--out", type=Path, help="folder for results (default: experiments; studies/tiny with --tiny)")
    given = parser.parse_args(arguments)
    default = HERE.parent / "studies" / "tiny" if given.tiny else HERE
    return Options(given.tiny, default if given.out is None else given.out)


def describe(name: str, doc: str, result: Result, options: Options, seconds: float) -> list[str]:
    """Write an experiment's section: its question, the table, the remarks, and where it was measured."""
    question = doc.strip().splitlines()[0]
    size = ", the tiny version" if options.tiny else ""
    rows = [HEADINGS, *((*check[:4], "holds" if check.holds else "**FAILS**") for check in result.checks)]
    return [
        f"## {name}",
        "",
        question,
        "",
        *table(rows),
        "",
        *(f"- {remark}" for remark in result.remarks),
        f"- Measured on {device()} in {seconds:.0f} s{size}.",
    ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows out as a Markdown table whose columns line up; the first row is the heading."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells):
        inner = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(inner)} |"

    rule = line(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return [line(rows[0]), rule, *map(line, rows[1:])]


def record(path: Path, name: str, section: str) -> None:
    """Replace one experiment's section of a file of verdicts, sections in alphabetical order; the rest stays."""
    text = path.read_text() if path.exists() else ""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    sections = {part.split("\n", 1)[0].removeprefix("## ").strip(): part.strip() for part in parts} | {name: section}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("\n\n".join([ABOUT, *(sections[key] for key in sorted(sections))]) + "\n")
    os.replace(temporary, path)


def device() -> str:
    """Name the device, the cores and the versions in one phrase."""
    first = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"a CPU with {cores} cores" if first.platform == "cpu" else first.device_kind
    return f"{kind}, JAX {jax.__version__}, Python {platform.python_version()}"


# Measuring ------------------------------------------------------------------------------------------------------------


def signals(
    net: fnn.Layer,
    batch: tuple[Any, Any],
    seeds: int,
    *,
    scales: Sequence[float] = (1.0,),
    loss: Callable[[Any, Any], Any] = fnn.losses.cross_entropy,
    train: bool = True,
    chunk: int = 8,
) -> list[dict[str, np.ndarray]]:
    """Measure the gradient flow of a net at initialisation, its parameters multiplied by each of the scales.

    One dict for each scale: `log_error` and `log_kernel`, natural logs as theory has them, and `second_moment`, each
    float64[seeds, layers].
    Layers are those with a kernel, of which the tap next behind it is reported. All seeds run in one program, `chunk`
    of them at once, all scales on the same draws.
    """

    @jax.jit
    def run(keys, factors):
        def one(key):
            params, state = net.init(key, batch[0])

            def measure(s):
                scaled = jax.tree.map(lambda p: s * p, params)
                return flow.measure(net, loss, train, scaled, state, *batch, None)

            return jax.lax.map(measure, factors)

        return jax.lax.map(one, keys, batch_size=chunk)

    every = run(jax.random.split(jax.random.key(1), seeds), np.asarray(scales, np.float32))
    labels, values = labelled(net, batch[0], every)
    results = {}
    for quantity, name, unit in (
        ("log10_error", "log_error", math.log(10)),
        ("log10_kernel", "log_kernel", math.log(10)),
        ("second_moment", "second_moment", 1.0),
    ):
        first: dict[int, int] = {}
        for place, (layer, _, found) in enumerate(labels):
            if found == quantity:
                first.setdefault(layer, place)
        results[name] = values[..., [first[layer] for layer in sorted(first)]] * unit
    return [{name: array[:, j] for name, array in results.items()} for j in range(len(scales))]


def labelled(net: fnn.Layer, x: Any, measured: Any) -> tuple[list[tuple[int, str, str]], np.ndarray]:
    """Undo the scales of what `flow.measure` returned, with any leading axes.

    Returns labels (layer, path, quantity) in forward order, and float64[lead..., labels].
    """
    measured = jax.device_get(measured)
    numbers = flow.resolve(measured, jax.eval_shape(net.init, jax.random.key(0), x)[0])
    return [label[:3] for label in numbers.labels], numbers.values


def log_mean_square(log_norms: np.ndarray) -> np.ndarray:
    """Take the log of the mean over runs (axis 0) of a norm's square, of its log: exact where squares underflow."""
    top = np.max(log_norms, axis=0)
    return 2 * top + np.log(np.mean(np.exp(2 * (log_norms - top)), axis=0))


def rate(log_squares: np.ndarray, skip: int = 3) -> float:
    """Fit the factor of |delta|² for one layer towards the input, leaving out the first `skip` layers."""
    layers = np.arange(len(log_squares))
    return float(np.exp(-np.polyfit(layers[skip:], log_squares[skip:], 1)[0]))


# Figures --------------------------------------------------------------------------------------------------------------


def panels(columns: int = 1, rows: int = 1, *, size: tuple[float, float] = (3.6, 3.3)) -> tuple[Any, np.ndarray]:
    """Make a figure of rows × columns axes, without pyplot's global state; axes: object[rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns + 0.4, size[1] * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def measured(axis: Any, x: Any, runs: Any, i: int, label: str) -> None:
    """Draw the median over runs (float[runs, n]) in the i-th colour, with a band from the 10th to the 90th percentile.

    At most eight markers, so that lines of many layers stay lines.
    """
    low, middle, high = np.nanquantile(np.asarray(runs, float), [0.1, 0.5, 0.9], axis=0)
    style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
    axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axis.plot(x, middle, markersize=3.5, linewidth=1.2, markevery=max(1, len(x) // 8), label=label, **style)


def predicted(axis: Any, x: Any, y: Any, label: str = "predicted") -> None:
    """Draw a predicted curve: dashed, black, and named once in each panel."""
    named = label in axis.get_legend_handles_labels()[1]
    axis.plot(x, y, "k--", linewidth=0.9, label=None if named else label)


def chance(axis: Any, value: float) -> None:
    """Draw what guessing reaches: dotted, grey."""
    axis.axhline(value, color="0.3", linestyle=":", linewidth=1.1, label=f"chance ({value:.3g})")


def caption(figure: Any, text: str, share: Sequence[Any] = ()) -> None:
    """Say at the top what lines and bands are; give the panels in `share` one vertical scale."""
    if len(share):
        limits = [axis.get_ylim() for axis in share]
        for axis in share:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.suptitle(text, fontsize=8, color="0.25")


def median_of(seeds: int) -> str:
    """Name what `measured` draws."""
    return f"median of {seeds} seeds, shaded from 10th to 90th percentile"


def finish(axis: Any, title: str, x: str, y: str, *, log_x: bool = False, log_y: bool = False) -> None:
    """Label an axis, set its scales, and show the legend, where there is one, below it: off the data."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if log_x:
        axis.set_xscale("log")
    if log_y:
        axis.set_yscale("log")
    if labels := axis.get_legend_handles_labels()[1]:
        columns = 1 if max(map(len, labels)) > 24 else 2
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24), "ncols": columns}
        axis.legend(*_theory_last(axis), frameon=False, fontsize=7.5, **below)


def _theory_last(axis: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: getattr(handles[i], "get_linestyle", lambda: "-")() != "-")
    return [handles[i] for i in order], [labels[i] for i in order]


def save(figure: Any, path: Path) -> None:
    """Write a PNG; ValueError if it is larger than 300 kB."""
    figure.draw_without_rendering()  # the layout knows the widths of tick labels only once they are drawn
    figure.savefig(path, dpi=120)
    if path.stat().st_size > LIMIT:
        raise ValueError(f"figure {path.name} must be under {LIMIT // 1000} kB, got {path.stat().st_size // 1000} kB")


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
