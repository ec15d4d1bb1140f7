"""`fnn study --check`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fnn.cli.terminal import console


@dataclass(frozen=True)
class Check:
    """Check how activations and updates change with width or depth after some steps, in several parametrisations.

    --check width 64:1024 takes the widths 64, 128, ..., 1024; --check depth 4,16,64 those depths. It prints the slopes of
    log10 of each size against log10 of the width or depth (0 is flat), and writes check.png and check.parquet. For a net of
    your own call fnn.coordinate_check(..., build=) in Python.
    """

    check: tuple[str, str]
    """width or depth, and its values: a list, or first:last, each twice the one before"""
    parametrization: str = ""
    """standard, mup, completep; by default standard,mup for width and all three for depth (completep is about residual
    nets)"""
    width: int = 64
    """units in each hidden layer, where depth is checked"""
    depth: int = 4
    """number of hidden layers, where width is checked"""
    activation: str = "tanh"
    """any activation of fnn study"""
    norm: str = "none"
    """none, batch_norm, layer_norm, rms_norm"""
    residual: str = ""
    """true or false; by default true where depth is checked, or completep is among the parametrisations"""
    base_width: int = 64
    """width at which all parametrisations are the standard one"""
    base_depth: int = 4
    """depth at which all parametrisations are the standard one"""
    steps: int = 3
    """training steps before the measurement"""
    seeds: int = 4
    """random initialisations of each net"""
    optimizer: str = "adam"
    """sgd, momentum, adam, adamw, rmsprop, lamb"""
    learning_rate: float = 0.01
    """learning rate at the base sizes"""
    batch_size: int = 32
    """examples in a step, and in the batch that is measured"""
    data: str = "digits"
    """digits, clusters, spirals, a folder of IDX files, or a .npz file"""
    out: str = "."
    """folder for check.png and check.parquet"""


def run(options: Check) -> int:
    """Do `fnn study --check`."""
    from fnn import check, files
    from fnn.parametrizations import Parametrization
    from fnn.study.coordinates import AXES, coordinate_check

    axis, text = options.check
    check.choice("study", AXES, check=axis)
    if options.residual:
        check.choice("study", ("true", "false"), residual=options.residual)
    named = [word.strip() for word in options.parametrization.split(",") if word.strip()]
    names = named or ["standard", "mup", *(["completep"] if axis == "depth" and options.residual != "false" else [])]
    residual = options.residual == "true" or (not options.residual and (axis == "depth" or "completep" in names))
    fixed = {"depth": options.depth} if axis == "width" else {"width": options.width}
    found = coordinate_check(
        axis,
        doubled(axis, text),
        parametrization=[Parametrization(name, options.base_width, options.base_depth) for name in names],
        options=fixed | {"activation": options.activation, "norm": options.norm, "residual": residual},
        steps=options.steps,
        seeds=options.seeds,
        optimizer=options.optimizer,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        data=options.data,
    )
    _print(found)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    files.save_figure(found.figure(), folder / "check.png", 110, "study")
    found.table.write_parquet(folder / "check.parquet")
    print(f"{folder / 'check.png'}, and {found.table.height:,} rows in {folder / 'check.parquet'}")
    return 0


def doubled(axis: str, text: str) -> list[int]:
    """Read `64:1024` as 64, 128, ..., 1024, and `4,16,64` as it stands.

    Errors: ValueError for what is not whole numbers above 0, and a range that does not rise.
    """
    first, colon, last = text.partition(":")
    words = [first, last] if colon else text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words) or (colon and int(first) >= int(last)):
        raise ValueError(
            f"study: --check {axis} must be a list of whole numbers, or first:last, got {text!r}; write --check {axis} 64:1024"
        )
    values = [int(word) for word in words]
    if not colon:
        return values
    found = [values[0]]
    while 2 * found[-1] <= values[1]:
        found.append(2 * found[-1])
    return found


def _print(found: Any) -> None:
    from rich.table import Table

    table = Table(
        title=f"slopes against log10 {found.axis} after {found.steps} steps, with 95 % intervals over "
        f"{found.table['seed'].n_unique()} seeds; flat is 0"
    )
    for name in ("parametrisation", "layer", "log10 of h", "log10 of update·x"):
        table.add_column(name, justify="left" if name in ("parametrisation", "layer") else "right")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for slope in found.slopes():
        text = f"{slope.slope:+.2f} [{slope.low:+.2f}, {slope.high:+.2f}]"
        text = text if math.isfinite(slope.slope) else "diverged"
        cells.setdefault(slope[:2], {})[slope.quantity] = text
    for key, texts in cells.items():
        table.add_row(*key, *(texts.get(name, "") for name in ("log10_activation", "log10_update")))
    console().print(table)
