"""`fnn report`."""

from dataclasses import dataclass

from fnn.cli.terminal import plain_warnings, printable


@dataclass(frozen=True)
class Report:
    """Write a study's figures, and an interactive page that opens in a browser and needs no internet connection."""

    folder: str
    """folder of the study, for example studies/latest"""


def run(options: Report) -> int:
    """Do `fnn report`."""
    from fnn.study.report import report

    with plain_warnings():
        written = report(options.folder)
    names = ", ".join(path.name for path in written)
    print(printable(f"wrote {names} to {options.folder}; open {written[-1]} in a browser"))
    return 0
