"""A study's folder: its description, its finished cells, and the table that they make up.

    FOLDER/study.json            what was asked: axes, cells with their runs, recorded steps, data, chunk sizes
    FOLDER/sessions.json         who worked on it: a list of {started, versions, devices, device_kind, x64, ..., xla_flags,
                                 commit, executor, data (its name), chance (share of the commonest held-out label)}
    FOLDER/command.txt           the command line that measures the same again, if one made it
    FOLDER/cells/00000.parquet   one file per finished cell, numbered as in study.json; written under a temporary name
                                 and renamed, so that a file that is there is whole

Each cell's file is plain Parquet, whose metadata `fnn` name its study and cell, and hold a SHA-256 of all its bytes
(see `checksum`). A file that is damaged, or of another study or cell, is found before any of it is parsed, named in a
warning and left out of the table. Running the study again moves it aside (00000.parquet.aside) and measures it again.

`study.json` is an object: `format` (6), `program` (the version of what is compiled), `axes` ({"static": [...],
"traced": [...]}, names in column order), `types` (of the axes), `cells` (a list of {"static": {axis: value}, "runs": [{"seed": 0, "sigma_w": 1.0, ...}, ...], "steps":
recorded, 0 first, "chunk": runs at once}), `steps` (those of all cells), `data` (shapes and a SHA-256), `loss`, `build`,
`measure` (functions, by name and a SHA-256 of their content), `unpromised` (what the functions reach that has no readable
content, such as an open file; a study with any is not resumed), `quantities`, and JAX's settings that change numbers:
`x64`, `matmul_precision`, `prng`, `threefry_partitionable`.

The table is long: one row for each (cell, run, step, layer, path, quantity); nothing is averaged.

| column | type | |
|---|---|---|
| cell | Int32 | number of the cell: one combination of static axes, one compiled program |
| depth width activation norm residual clip batch_size optimizer init | Int32 Int32 String String Boolean String Int32 String String | static axes; with your own `build=`, the axes of that function instead |
| seed sigma_w sigma_b learning_rate clip_threshold | Int32 Float64 ... | traced axes: a run is one value of each |
| step | Int32 | updates done before the measurement; 0 is initialisation |
| layer | Int32 | layers with weights (arrays of two axes or more), counted from 1 next to the input; 0 for quantities of the whole run |
| path | String | of the parameter or tap, as `watch` writes it for its quantities; "" for quantities of the whole run |
| role | String | of the tap: "preactivation", "activation" or "sum" in the nets of fnn; "" for everything else |
| quantity | String | see below |
| value | Float64 | the measured number; of quantities that begin with log10_ its decimal log; -inf is the log of zero; NaN where the signal left the range of the float type |
| predicted low high | Float64 | theory for that layer, and the band that holds 19 of 20 seeds; null where there is no theory |
| outside | Boolean | whether value lies outside low..high; null where there is no band |
| float64 | Boolean | whether it was measured in float64: everything under x64; without, at step 0, all layers of a run whose signal leaves the range of float32 on its way forward or back, such as ReLU at depth 256 |

Quantities of a layer: `log10_error`, log10 of the root mean square over examples of |d l_i/dh|, at every tap (theory
predicts those with the role "preactivation", up to the last hidden layer, at step 0); `log10_kernel`, `log10_bias` (and
so on for other parameters), log10 of the Frobenius norm of the mean loss's gradient, and `log10_kernel_rms`, its root mean square
per entry; `mean`, `second_moment`, `dead`, `saturated` (and `peak`, if asked for) at every tap; `update_ratio`,
|update|/|weights| of the optimiser's next update, and `cosine`, between the gradient and the one at the recorded step
before, both for every parameter.
Where `build` returns a pair (init, loss), layers and their quantities are those of `fnn.watch`, listed at `fnn.Flow`:
`log10_gradient`, `log10_error`, `input_mean`, `input_second_moment`, `input_dead`, ..., and others if `quantities` names them;
besides `update_ratio` and `cosine`. `cosine_to_weight` is what `watch` calls cosine. Of a Layer they are there if named.
Spectra, if named, have layer 0: `sharpness`, `lambda_c`, `hessian_trace`, ..., listed in `fnn/study/spectral.py`.
Quantities of a run: at recorded steps `loss`, `accuracy` (held-out); at every step of training (thinned evenly to 256) `train_loss`, `train_accuracy`, `grad_norm`, `clip_fraction`, `clip_removed` on that step's batch; and
one row `diverged` for each run: 0 at its last step, or 1 at the step whose loss or gradient was not finite. The record
of a run ends where it diverges; that step's layers are included if its loss was still finite. Your own
measurements have their own names, and layer 0 unless their path is that of a parameter.

Read a folder with `results.read(folder)`: a `Results` with `.description` (study.json), `.sessions`, `.table()` (polars),
`.finished` (numbers of the finished cells), `.left_out` (what is wrong with files that are left out) and `.times()`.
"""

import functools
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fnn import files
from fnn.study import checksum, table
from fnn.study.checksum import pack as pack
from fnn.study.identity import canonical

if TYPE_CHECKING:
    import polars

FORMAT = 6
"""Formats up to 3 counted depth without the first hidden layer, and had no column `role`; up to 4 no column `float64`."""
_VALUE = (int, float, bool, str, type(None))
_SHAPE = {
    "axes": {"static": [str], "traced": [str]},
    "types": {str: str},
    "steps": [int],
    "cells": [{"static": {str: _VALUE}, "runs": [{str: _VALUE}], "chunk": int}],
}
_REMEDY = "make room or choose another folder with --out (what is finished stays, and the same command resumes)"


class LeftOut(UserWarning):
    """Warns of a cell's file that is damaged or belongs to another study, and says what was done with it."""


@dataclass
class Results:
    """What a study has measured so far, in a folder or in memory."""

    description: dict[str, Any]
    sessions: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    frames: dict[int, bytes] = field(default_factory=dict)
    """Finished cells, where there is no folder."""

    def __repr__(self) -> str:
        cells, there = self.description.get("cells", ()), len(self._present())
        names = ", ".join(name for kind in self.description.get("axes", {}).values() for name in kind)
        return f"Results({there} of {len(cells)} cells, axes {names:.300}, in {self.folder or 'memory'})"

    @property
    def finished(self) -> list[int]:
        """Numbers of the finished cells, in order. Reads and checks every byte of their files."""
        return [number for number, why in self._checked() if why is None]

    @property
    def left_out(self) -> dict[int, str]:
        """What is wrong with files that are left out: {number of the cell: the beginning of a sentence}."""
        return {number: why for number, why in self._checked() if why is not None}

    def table(self) -> "polars.DataFrame":
        """Read all finished cells as one polars table, cells in order. (`.to_pandas()` needs pandas and pyarrow.)

        A file that is damaged, or belongs to another study, is left out and named in a warning (`LeftOut`).
        Errors: FileNotFoundError where no cell is finished.
        """
        import polars as pl

        frames = []
        for number in self._present():
            try:
                frames.append(self._read(number))
            except ValueError as error:
                warnings.warn(LeftOut(f"{error}; it is left out; move it away and run the study again"), stacklevel=2)
        if not frames:
            raise FileNotFoundError(f"study: {self.folder or 'this study'} holds no finished cell; run it first")
        return pl.concat(frames)

    def times(self) -> "polars.DataFrame":
        """List the seconds that each finished cell took: polars, columns cell, compile, run (training and measuring), draw, tables."""
        import polars as pl

        rows = [{"cell": number, **self._whole(number)[1]["seconds"]} for number in self.finished]
        schema = {"cell": pl.Int32, **dict.fromkeys(("compile", "run", "draw", "tables"), pl.Float64)}
        return pl.DataFrame(rows, schema=schema)

    def store(self, number: int, parquet: bytes) -> None:
        """Keep a finished cell: in the folder whole or not at all."""
        if self.folder is None:
            self.frames[number] = parquet
        else:
            _write(self._path(number), parquet)

    @functools.cached_property
    def _key(self) -> str:
        return key(self.description)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / "cells" / f"{number:05d}.parquet"

    def _present(self) -> list[int]:
        if self.folder is None:
            return sorted(self.frames)
        return [number for number in range(len(self.description["cells"])) if self._path(number).exists()]

    def _checked(self) -> Iterator[tuple[int, str | None]]:
        for number in self._present():
            try:
                self._whole(number)
                yield number, None
            except ValueError as error:
                yield number, str(error)

    def _whole(self, number: int) -> tuple[bytes, dict[str, Any]]:
        """Return a cell's bytes and note, after checking that they are whole and belong to this cell of this study.

        Errors: ValueError, naming the file.
        """
        import polars as pl

        name = self._name(number)
        content = self.frames[number] if self.folder is None else _content(self._path(number), name)
        note = checksum.check(content, name)
        if note["study"] != self._key:
            raise ValueError(f"{name} belongs to another study")
        if note["cell"] != number:
            raise ValueError(f"{name} is a copy of cell {note['cell']}")
        with checksum.foreign(name):
            if dict(pl.read_parquet_schema(io.BytesIO(content))) != dict(self._columns()):
                raise ValueError("its columns are not those of the study")
        return content, note

    def _read(self, number: int) -> Any:
        import polars as pl

        content, _ = self._whole(number)
        with checksum.foreign(self._name(number)):
            return pl.read_parquet(content).select(list(self._columns()))

    def _columns(self) -> Any:
        import polars as pl

        return pl.Schema(table.schema(self.description["types"]))

    def _name(self, number: int) -> str:
        return f"study: cell {number}" if self.folder is None else f"study: {self._path(number)}"


def read(folder: str | os.PathLike[str]) -> Results:
    """Read a study's folder; the tables themselves are read by `.table()`.

    Errors: FileNotFoundError for a folder without a study, ValueError for a damaged or foreign description.
    """
    folder = Path(folder)
    path = folder / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"study: {folder} must hold a study, got no study.json there; check the folder's name")
    version = files.load_json(path, {str: object}).get("format")
    if version != FORMAT:
        raise ValueError(f"study: {path} must have format {FORMAT}, got {version!r:.40}; choose another folder")
    description = files.load_json(path, _SHAPE)
    axes = [*description["axes"]["static"], *description["axes"]["traced"]]
    if sorted(axes) != sorted(description["types"]) or any(cell["chunk"] < 0 for cell in description["cells"]):
        raise ValueError(
            f"study: {path} is damaged (axes, types and chunks do not fit together); restore it, or choose another folder"
        )
    sessions = folder / "sessions.json"
    return Results(description, files.load_json(sessions, [{str: object}]) if sessions.is_file() else [], folder)


@contextmanager
def opened(
    folder: str | os.PathLike[str] | None,
    description: dict[str, Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]],
    session: dict[str, Any],
    chosen: bool,
) -> Iterator[Results]:
    """Start a study in a folder, or resume the one that is there, and lock the folder meanwhile.

    `complete` chooses the chunk sizes of a new study. A study that is resumed keeps its own, and refuses others if they
    were `chosen`. Where all cells are finished nothing is written, so the folder may be read-only. A cell's file that is
    damaged, or belongs to another study, is moved aside with a warning (`LeftOut`), and the cell is measured again.
    Errors: ValueError for a folder with another study (and how it differs) or a damaged description; OSError for a
    folder that cannot be written, or is in use.
    """
    if folder is None:
        yield Results(complete(description), [session])
        return
    folder = Path(folder)
    results = _resumed(folder, description, chosen)
    if results is not None and len(results.finished) == len(results.description["cells"]):
        files.sweep(folder, folder / "cells")
        yield results
        return
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(folder, error, remedy=_REMEDY) from None
    with files.locked(folder):
        files.sweep(folder, folder / "cells")
        results = _resumed(folder, description, chosen)
        if results is None:
            if strangers := sorted((folder / "cells").glob("*.parquet")):
                raise ValueError(
                    f"study: {folder} holds cells but no study.json, got {strangers[0].name}; restore it, or choose "
                    "another folder"
                )
            description = complete(description)
            _write(folder / "study.json", json.dumps(description, indent=1).encode())
            results = Results(description, [], folder)
        for number, why in results.left_out.items():
            aside = files.set_aside(results._path(number))
            warnings.warn(LeftOut(f"{why}; it is kept as {aside.name}, and the cell is measured again"), stacklevel=2)
        results.sessions = [*results.sessions, session]
        _write(folder / "sessions.json", json.dumps(results.sessions, indent=1).encode())
        yield results


def _resumed(folder: Path, description: dict[str, Any], chosen: bool) -> Results | None:
    """Read the study in a folder, None where there is none; refuse one that differs from the description."""
    if not (folder / "study.json").is_file():
        return None
    results = read(folder)
    if doubts := description.get("unpromised"):
        raise ValueError(
            f"study: to resume {folder} its functions must be compared with these, got some whose content cannot be read: "
            f"{'; '.join(doubts)}; pass functions without it, or choose another folder"
        )
    if differences := difference(results.description, description, chosen):
        raise ValueError(
            f"study: {folder} holds another study: {'; '.join(differences)}; choose another folder, or ask for the "
            "same study to resume it"
        )
    return results


def key(description: dict[str, Any]) -> str:
    """Give a short name that two descriptions share only if they must give the same numbers; 1 and 1.0 count as equal."""
    return hashlib.sha256(_text({**description, "types": None}).encode()).hexdigest()[:16]


def difference(there: dict[str, Any], here: dict[str, Any], chosen: bool = False) -> list[str]:
    """List how two descriptions differ, axis by axis and option by option."""

    def shown(value):
        if isinstance(value, list):
            return ", ".join(map(str, value)) if len(value) <= 12 else f"{len(value)} values"
        return str(value)

    def parts(description):
        cells = description["cells"]
        axes: dict[str, Any] = {}
        for cell in cells:
            for name, value in (*cell["static"].items(), *(pair for run in cell["runs"] for pair in run.items())):
                axes.setdefault(name, {})[_text(value)] = value
        rest = {name: value for name, value in description.items() if name not in ("cells", "axes", "types")}
        return {name: list(values.values()) for name, values in axes.items()} | rest

    a, b = parts(there), parts(here)
    found = [
        f"{name} is {shown(a.get(name, 'missing'))} there, {shown(b.get(name, 'missing'))} here"
        for name in dict.fromkeys((*a, *b))
        if _text(a.get(name, "missing")) != _text(b.get(name, "missing"))
    ]

    def grid(description, chunks):
        return [cell if chunks else {**cell, "chunk": 0} for cell in description["cells"]]

    if not found and _text(grid(there, False)) != _text(grid(here, False)):
        found.append("the same axes are combined in another way or order")
    if not found and chosen and _text(grid(there, True)) != _text(grid(here, True)):
        found.append(f"chunk is {there['cells'][0]['chunk']} there, {here['cells'][0]['chunk']} here")
    return found


def _text(part: Any) -> str:
    return json.dumps(canonical(part), sort_keys=True)


def _content(path: Path, name: str) -> bytes:
    """Read the file in a cell's place; a pipe or a device could be read for ever."""
    if not path.is_file():
        raise ValueError(f"{name} is damaged (it is no file)")
    try:
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise ValueError(f"{name} cannot be read ({getattr(error, 'strerror', None) or 'out of memory'})") from None


def _write(path: Path, content: bytes) -> None:
    files.write(path, content, remedy=_REMEDY)
