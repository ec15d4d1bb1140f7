"""A study's folder: description, finished cells, and the table that they make up.

    FOLDER/study.json            what was asked: axes, cells with their runs, recorded steps, data, chunk sizes
    FOLDER/sessions.json         who worked on it: a list of {started, versions, devices, device_kind, x64, ..., xla_flags,
                                 commit, executor}
    FOLDER/cells/00000.parquet   one file per finished cell, numbered as in study.json; written to a temporary name
                                 and renamed, so that a file that is there is whole

`study.json` is an object: `format` (3), `axes` ({"static": [...], "traced": [...]}, names in column order), `types`
(of the axes), `cells` (a list of {"static": {axis: value}, "runs": [{"seed": 0, "sigma_w": 1.0, ...}, ...], "steps":
recorded, 0 first, "chunk": runs at once}), `steps` (those of all cells), `data` (shapes and a digest), `loss`, `build`,
`measure` (functions, by name and a digest of their content), `unpromised` (what in them has no content that can be read:
such a study is not resumed), `quantities`, `x64`, `matmul_precision`, `prng`, `threefry_partitionable` (JAX's settings
that change numbers).

The table is tidy and long: a row for each (cell, run, step, layer, path, quantity); nothing is averaged.

| column | type | |
|---|---|---|
| cell | Int32 | number of the cell: one combination of static axes, one compiled program |
| depth width activation norm residual clip batch_size optimizer init | Int32 Int32 String String Boolean String Int32 String String | static axes; with a `build=` of one's own, that function's axes instead |
| seed sigma_w sigma_b learning_rate clip_threshold | Int32 Float64 ... | traced axes: a run is one value of each |
| step | Int32 | updates done before the measurement; 0 is initialisation |
| layer | Int32 | counted by kernels, 1 next to the input; 0 for quantities of the whole run |
| path | String | of the parameter or tap, "" for quantities of the whole run |
| quantity | String | see below |
| value | Float64 | as measured; logs are natural; -inf is the log of zero |
| predicted low high | Float64 | theory at that layer and the band that 19 of 20 seeds stay in; null where there is none |
| outside | Boolean | whether value lies outside low..high; null where there is no band |

Quantities of a layer: `log_error`, log root mean over examples of |d l_i/dh|, at every tap (theory speaks of those
whose path ends in "preactivation", layers 1..depth+1, step 0); `log_kernel`, `log_bias` (and other parameters), log
Frobenius norm of the mean loss's gradient, and `log_kernel_rms`, per number; `mean`, `second_moment`, `dead`,
`saturated` at every tap; `update_ratio`, |update|/|weights| of the update that the optimiser takes next, and `cosine`
with the gradient at the recorded step before, both for every parameter.
Quantities of a run: at recorded steps `loss`, `accuracy` on the held-out examples; at every step of training (evenly
thinned to 256) `train_loss`, `train_accuracy`, `grad_norm`, `clip_fraction`, `clip_removed` on that step's batch; and
one row `diverged` for each run, 0 at its last step, or 1 at the step whose loss or gradient was not finite: the record
of that run ends there, with the layers' numbers if the loss still was finite. Measurements of one's own go by their
names, at layer 0 unless their path is that of a parameter.

Read a folder with `results.read(folder)`: a `Results` with `.description` (study.json), `.sessions`, `.table()` (polars),
`.finished` (numbers of the finished cells) and `.times()`.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fnn.identity import canonical

FORMAT = 3


@dataclass
class Results:
    """What a study has measured so far: in a folder, or in memory alone."""

    description: dict[str, Any]
    sessions: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    frames: dict[int, Any] = field(default_factory=dict)
    """Finished cells that are in no folder."""

    @property
    def finished(self) -> list[int]:
        """Numbers of the finished cells, in order."""
        if self.folder is None:
            return sorted(self.frames)
        return [number for number in range(len(self.description["cells"])) if self._path(number).is_file()]

    def table(self) -> Any:
        """Read all finished cells as one polars table, cells in order; `.to_pandas()` makes it pandas, where
        pandas and pyarrow are there.

        Errors: ValueError, naming the file, for one that cannot be read; FileNotFoundError where no cell is finished.
        """
        import polars as pl

        if not self.finished:
            raise FileNotFoundError(f"study: {self.folder or 'this study'} holds no finished cell; run it first")
        return pl.concat([self._read(number) for number in self.finished])

    def times(self) -> Any:
        """List the seconds that each finished cell took: polars, columns cell, compile, run."""
        import polars as pl

        rows = [{"cell": number, **self._note(number)["seconds"]} for number in self.finished]
        return pl.DataFrame(rows, schema={"cell": pl.Int32, "compile": pl.Float64, "run": pl.Float64})

    def store(self, number: int, parquet: bytes) -> None:
        """Keep a finished cell: in the folder whole or not at all."""
        if self.folder is None:
            self.frames[number] = parquet
        else:
            write(self._path(number), parquet)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / "cells" / f"{number:05d}.parquet"

    def _source(self, number: int) -> Any:
        return io.BytesIO(self.frames[number]) if self.folder is None else self._path(number)

    def _read(self, number: int) -> Any:
        import polars as pl

        with _whole(self._source(number)):
            return pl.read_parquet(self._source(number))

    def _note(self, number: int) -> dict[str, Any]:
        """Read what stands beside the table of a cell: its seconds, and the study that it belongs to."""
        import polars as pl

        with _whole(self._source(number)):
            return json.loads(pl.read_parquet_metadata(self._source(number))["fnn"])


def pack(table: Any, note: dict[str, Any]) -> bytes:
    """Write the table of a cell as the bytes of a Parquet file, with a note in its metadata."""
    buffer = io.BytesIO()
    table.write_parquet(buffer, metadata={"fnn": json.dumps(note)})
    return buffer.getvalue()


def read(folder: str | os.PathLike[str]) -> Results:
    """Read a study's folder; the tables themselves are read by `.table()`.

    Errors: FileNotFoundError for a folder without a study, ValueError for a damaged or foreign description.
    """
    folder = Path(folder)
    path = folder / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"study: {folder} must hold a study, got no study.json there; check the folder's name")
    description = _json(path, dict)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"study: {path} must have format {FORMAT}, got {description.get('format')!r}; choose another folder"
        )
    sessions = folder / "sessions.json"
    return Results(description, _json(sessions, list) if sessions.is_file() else [], folder)


@contextmanager
def opened(
    folder: str | os.PathLike[str] | None,
    description: dict[str, Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]],
    session: dict[str, Any],
    chosen: bool,
) -> Iterator[Results]:
    """Start a study in a folder, or take up the one that is there, and keep others out meanwhile.

    `complete` chooses the chunk sizes of a new study; one that is taken up keeps its own, and refuses others if they
    were `chosen`. Errors: ValueError for a study that differs, with the
    differences; for a damaged file; OSError for a folder that cannot be written, or in use.
    """
    if folder is None:
        yield Results(complete(description), [session])
        return
    folder = Path(folder)
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    with _locked(folder):
        for left in (*folder.glob(".*.part"), *(folder / "cells").glob(".*.part")):
            left.unlink(missing_ok=True)  # of a run that was killed while it wrote
        if (folder / "study.json").is_file():
            results = read(folder)
            if doubts := description.get("unpromised"):
                raise ValueError(
                    f"study: cannot promise that {folder} holds this study, for its content cannot be read: "
                    f"{'; '.join(doubts)}; pass a function without it, or choose another folder"
                )
            if differences := difference(results.description, description, chosen):
                raise ValueError(
                    f"study: {folder} holds another study: {'; '.join(differences)}; choose another folder, or ask "
                    "for the same study to resume it"
                )
            identity = key(results.description)
            for number in results.finished:
                if results._note(number).get("study") != identity:
                    raise ValueError(
                        f"study: {results._path(number)} belongs to another study; move it away, and the cell is "
                        "measured again"
                    )
        else:
            strangers = sorted((folder / "cells").glob("*.parquet"))
            if strangers:
                raise ValueError(
                    f"study: {folder} holds cells but no study.json, got {strangers[0].name}; restore it, or choose "
                    "another folder"
                )
            description = complete(description)
            write(folder / "study.json", json.dumps(description, indent=1).encode())
            results = Results(description, [], folder)
        results.sessions = [*results.sessions, session]
        write(folder / "sessions.json", json.dumps(results.sessions, indent=1).encode())
        yield results


def key(description: dict[str, Any]) -> str:
    """Give a short name that two descriptions share only if their numbers must be the same: 1 and 1.0 are one."""
    import hashlib

    return hashlib.sha256(_text({**description, "types": None}).encode()).hexdigest()[:16]


def difference(there: dict[str, Any], here: dict[str, Any], chosen: bool = False) -> list[str]:
    """Say how two descriptions differ, axis by axis and option by option; an empty list if they do not."""

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


def write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file is ever seen."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(
        f"study: cannot write {path}: {error.strerror or error}; make room or choose another folder with --out (what "
        "is finished stays, and the same command resumes)"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back however this process ends."""
    try:
        import fcntl
    except ImportError:  # not on this system: two runs at once would do work twice, but break nothing
        yield
        return
    try:
        (folder / ".lock").touch()
    except OSError as error:
        raise _cannot_write(folder, error) from None
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OSError(f"study: {folder} is in use by another run; wait for it, or choose another folder") from None
        yield


@contextmanager
def _whole(source: Any) -> Iterator[None]:
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, KeyError, ValueError, OSError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"study: {source} is damaged ({first}); move it away, and the cell is measured again"
        ) from None


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, kind):
            raise ValueError(f"holds a {type(content).__name__}")
        return content
    except ValueError as error:
        raise ValueError(
            f"study: {path} is damaged ({error}); restore it, or choose another folder: the finished cells beside it "
            "are as they were"
        ) from None
