"""Command line of the benchmarks: `python -m bench --suite step --rows 64x3,256x8 --peers fnn-fit,jax-steps --quick`.

A new suite is a module with `ABOUT` and `run(options, say) -> sections`, entered in `SUITES`.
"""

import argparse
import re
import sys
import time
from typing import Any

import jax
from rich.console import Console

from bench import report, step
from bench.peers import PEERS
from bench.problem import ROWS, Row

SUITES = {"step": step}


def rows(text: str) -> list[Row]:
    """Parse `64x3,256x8/128`: width x depth, and a batch size where it is not that of the table."""
    return [_row(part) for part in text.split(",")]


def peers(text: str) -> list[str]:
    """Parse a list of peers."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"unknown peers {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return names


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    listing = "\n".join(f"  {name:20}{peer.about}" for name, peer in PEERS.items())
    parser = argparse.ArgumentParser(
        "python -m bench", description="Benchmarks of fnn.", epilog=f"peers:\n{listing}", formatter_class=_Formatter
    )
    parser.add_argument("--suite", choices=SUITES, default="step")
    parser.add_argument(
        "--rows", type=rows, help=f"comma-separated width x depth, of {','.join(ROWS)} or W x D / batch"
    )
    parser.add_argument("--peers", type=peers, help="comma-separated; by default all but torch-compile")
    parser.add_argument("--all", action="store_true", help="lift the depth limits of slow compilers")
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, and by default the two first rows")
    parser.add_argument("--rounds", type=int, help="interleaved rounds; by default 15, or 3 with --quick")
    parser.add_argument(
        "--precision",
        choices=("highest", "default"),
        default="highest",
        help="of matrix products: true float32, or the accelerator's own choice (TF32 on a GPU); on a CPU the same",
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Run a suite, print its tables and write them to `bench/results/`."""
    options, console = parse(), Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    jax.config.update("jax_default_matmul_precision", options.precision)
    machine, suite = report.environment(), SUITES[options.suite]
    console.print("\n".join(report.lines(machine)), markup=False)
    kind = "-quick" if options.quick else ""
    stem = f"{options.suite}-{jax.devices()[0].platform}{kind}-{time.strftime('%Y%m%dT%H%M%S')}"
    sections: list[Any] = []
    for section in suite.run(options, lambda text: console.print(text, markup=False)):
        sections.append(section)
        console.print(section.rich())
        paths = report.write(stem, options.suite, suite.ABOUT, machine, sections)
    console.print("written: " + ", ".join(report.shown(path) for path in paths))


def _row(text: str) -> Row:
    match = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?", text)
    if not match or (match[3] is None and text not in ROWS):
        raise argparse.ArgumentTypeError(f"{text!r}: must be one of {', '.join(ROWS)}, or have a batch size: 64x3/32")
    return Row(int(match[1]), int(match[2]), int(match[3])) if match[3] else ROWS[text]


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and leave the list of peers as it is."""


if __name__ == "__main__":
    sys.exit(main())
