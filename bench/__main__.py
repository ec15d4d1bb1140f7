"""Command line of the benchmarks: `python -m bench --suite step --rows 64x3,256x8 --peers fnn-fit,jax-steps --quick`.

A new suite is a module with `ABOUT` and `run(options, say) -> sections`, entered in `SUITES`.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from bench import (
    accelerator,
    compile,
    depth,
    kernels,
    models,
    per_example,
    report,
    saving,
    scale,
    spectra,
    step,
    sweep,
    ward,
    watch,
)
from bench.problem import ROWS, Row

SUITES = {
    "step": step,
    "models": models,
    "compile": compile,
    "depth": depth,
    "sweep": sweep,
    "scale": scale,
    "saving": saving,
    "per_example": per_example,
    "watch": watch,
    "ward": ward,
    "spectra": spectra,
    "kernels": kernels,
}


def rows(text: str) -> list[Row]:
    """Parse `64x3,256x8/128,4096x8/8192/bf16`: width x depth, a batch size that is not the table's, and a dtype."""
    return [_row(part) for part in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    listing = "\n".join(
        f"  {suite}:\n" + "\n".join(f"    {name:20}{about}" for name, about in module.NAMES.items())
        for suite, module in SUITES.items()
    )
    parser = argparse.ArgumentParser(
        "python -m bench", description="Benchmarks of fnn.", epilog=f"peers:\n{listing}", formatter_class=_Formatter
    )
    parser.add_argument(
        "--accelerator", action="store_true", help="all there is to measure on a GPU; see bench.accelerator"
    )
    parser.add_argument("--suite", choices=SUITES, default="step", help="what to measure")
    parser.add_argument(
        "--rows",
        help=f"comma-separated: width x depth of {','.join(ROWS)}, or W x D / batch, or W x D / batch / bf16; "
        f"in the suite models {','.join(models.MODELS)}, in kernels {','.join(kernels.training.ORDER)}",
    )
    parser.add_argument("--peers", type=lambda text: text.split(","), help="comma-separated; see below")
    parser.add_argument("--all", action="store_true", help="lift the depth limits of slow compilers")
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, and by default the two first rows")
    parser.add_argument("--rounds", type=int, help="interleaved rounds; by default 15, or 3 with --quick")
    parser.add_argument(
        "--seconds",
        type=float,
        help="for a row of step or models, for all of ward: later, nothing new is begun; no limit",
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "default"),
        default="highest",
        help="of matrix products: true float32, or the accelerator's own choice (TF32 on a GPU); on a CPU the same",
    )
    parser.add_argument("--slack", type=float, default=1.0, help="ward: budgets times this, on a machine that is busy")
    parser.add_argument("--resume", type=Path, help="ward: a JSON file whose records are not run again")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the JSON and the Markdown")
    parser.add_argument("--trace", type=Path, help="folder for profiler traces of fnn-fit (suite step)")
    options = parser.parse_args(arguments)
    try:
        select = {"models": models.select, "kernels": kernels.select}.get(options.suite, rows)
        options.rows = options.rows and select(options.rows)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(f"--rows: {error}")
    names = SUITES[options.suite].NAMES
    if unknown := [name for name in options.peers or () if name not in names]:
        parser.error(f"suite {options.suite} has no {', '.join(unknown)}; there are {', '.join(names)}")
    if options.trace and options.suite != "step":
        parser.error(f"--trace goes with the suite step, got {options.suite}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run a suite, print its tables and write them to `bench/results/`."""
    if "--accelerator" in (sys.argv[1:] if arguments is None else arguments):
        sys.exit(accelerator.main(arguments))
    options, console = parse(arguments), Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    jax.config.update("jax_default_matmul_precision", options.precision)
    machine, suite = report.environment(), SUITES[options.suite]
    console.print("\n".join(report.lines(machine)), markup=False)
    kind = "-quick" if options.quick else ""
    stem = f"{options.suite}-{jax.devices()[0].platform}{kind}-{time.strftime('%Y%m%dT%H%M%S')}"
    sections: dict[str, Any] = {}
    for section in suite.run(options, lambda text: console.print(text, markup=False)):
        sections[section.title] = section
        if section.done:
            console.print(section.rich())
        paths = report.write(options.out, stem, options.suite, suite.ABOUT, machine, list(sections.values()))
    console.print("written: " + ", ".join(report.shown(path) for path in paths))


def _row(text: str) -> Row:
    match = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?(/bf16)?", text)
    if not match or (match[3] is None and text not in ROWS):
        raise argparse.ArgumentTypeError(f"{text!r}: must be one of {', '.join(ROWS)}, or have a batch size: 64x3/32")
    if int(match[2]) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: the depth must be at least 2, for the peers that scan over it")
    dtype = "bfloat16" if match[4] else "float32"
    return Row(int(match[1]), int(match[2]), int(match[3]), dtype) if match[3] else ROWS[text]


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and leave the list of peers as it is."""


if __name__ == "__main__":
    sys.exit(main())
