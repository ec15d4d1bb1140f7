"""Files of cells: what is damaged, foreign or in another's place is named and left out, and never gives other numbers."""

import errno
import json
import os
import shutil

import numpy as np
import polars as pl
import pytest

import fnn
from fnn import files
from fnn.cli import main
from fnn.layers import taps
from fnn.study import cell, checksum, report, results, table

AXES = {"depth": "int", "activation": "str", "norm": "str", "seed": "int"}


def made(folder, seeds=2, cells=3):
    """Write a small study's folder as a run would, without running it."""
    (folder / "cells").mkdir(parents=True)
    runs = [{"seed": seed} for seed in range(seeds)]
    static = [{"depth": 1, "activation": name, "norm": "none"} for name in ("tanh", "relu", "erf")[:cells]]
    description = {
        "format": results.FORMAT,
        "axes": {"static": list(AXES)[:-1], "traced": ["seed"]},
        "types": AXES,
        "steps": [0],
        "cells": [{"static": part, "runs": runs, "steps": [0], "chunk": seeds} for part in static],
    }
    (folder / "study.json").write_text(json.dumps(description))
    for number, part in enumerate(static):
        rows = [
            {"cell": number, **part, **run, "step": 0, "layer": layer, "path": f"{layer}/preactivation"}
            | {"role": "preactivation", "quantity": "log10_error", "value": number + 0.1 * layer + 0.01 * run["seed"]}
            for run in runs
            for layer in (1, 2, 3)
        ]
        put(folder, number, pl.DataFrame(rows, schema=table.schema(AXES)))
    return folder


def put(folder, number, frame, **note):
    """Write a cell as a run would, or with another note."""
    key = results.key(json.loads((folder / "study.json").read_text()))
    whole = {"study": key, "cell": number, "seconds": {"compile": 1.0, "run": 1.0}} | note
    path(folder, number).write_bytes(results.pack(frame, whole))


def path(folder, number=1):
    return folder / "cells" / f"{number:05d}.parquet"


@pytest.fixture
def folder(tmp_path):
    return made(tmp_path / "study")


def test_new_statistics_are_a_new_program():
    """A folder that was finished before a statistic was added would be called finished still: raise `cell.VERSION` then."""
    assert (cell.VERSION, taps.STATISTICS) == (3, ("mean", "second_moment", "peak", "dead", "saturated"))


def test_a_whole_cell_is_plain_parquet_and_found_whole(folder):
    found = results.read(folder)
    assert found.finished == [0, 1, 2] and found.left_out == {}
    assert found.table().equals(pl.concat([pl.read_parquet(path(folder, n)) for n in range(3)]))
    assert found.times()["run"].to_list() == [1.0] * 3
    shutil.copytree(folder, folder.with_name("copy"))
    assert results.read(folder.with_name("copy")).table().equals(found.table())


def test_every_flipped_bit_is_found(folder):
    good, found = path(folder).read_bytes(), results.read(folder)
    kept = results.Results(found.description, frames={1: good})
    assert kept.finished == [1]
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        kept.frames[1] = bytes(bad)
        try:
            kept._whole(1)
        except ValueError as error:
            assert "damaged" in str(error)  # before anything is parsed
        else:
            raise AssertionError(f"bit {bit}")
    for bit in np.random.default_rng(0).integers(8 * len(good), size=50):  # and in a file
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << int(bit) % 8
        path(folder).write_bytes(bad)
        assert found.finished == [0, 2] and "00001.parquet is damaged" in found.left_out[1]


def test_torn_and_lengthened_files_are_found(folder):
    good, found = path(folder).read_bytes(), results.read(folder)
    for bad in (
        *(good[:n] for n in range(0, len(good), 97)),
        good + b"\0",
        b"\0" + good,
        good + good,
        good[:-1] + b"2",
    ):
        path(folder).write_bytes(bad)
        assert found.finished == [0, 2], len(bad)


def directory(path):
    path.unlink()
    path.mkdir()
    (path / "mine").touch()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def forged(path, frame=None, **note):
    folder = path.parent.parent
    put(folder, 1, pl.DataFrame({"a": [1]}) if frame is None else frame, **note)


HARM = {
    "damaged or foreign": lambda p: p.write_bytes(b""),
    "holds no SHA-256": lambda p: pl.DataFrame({"a": [1]}).write_parquet(p),
    "is a copy of cell 0": lambda p: shutil.copyfile(p.with_name("00000.parquet"), p),
    "belongs to another study": lambda p: shutil.copyfile(path(made(p.parent.parent / "other", seeds=3)), p),
    "it is no file": directory,
    "it is no file ": pipe,
    "its columns are not": forged,
    "must be of type int": lambda p: forged(p, cell="1"),
    "must be of type float": lambda p: forged(p, seconds={"compile": [], "run": None}),
}


@pytest.fixture
def page_alone(monkeypatch):
    """Let a report draw its figures and save none: that takes longer than all else, and test_report looks at them."""
    monkeypatch.setattr(report, "FORMATS", ())


@pytest.mark.usefixtures("page_alone")
@pytest.mark.parametrize("said", HARM)
def test_what_is_no_cell_of_this_study_is_named_and_left_out(folder, said, capsys):
    HARM[said](path(folder))
    said = said.strip()
    found = results.read(folder)
    with pytest.warns(results.LeftOut, match=f"00001.parquet .*{said}.*left out") as warned:
        frame = found.table()
    assert len(warned) == 1 and frame["cell"].unique().to_list() == [0, 2] == found.finished
    assert said in found.left_out[1]
    assert found.times()["cell"].to_list() == [0, 2]
    # The command line says so too, each time in a sentence.
    for command in (["compare", str(folder), str(folder)], ["report", str(folder)]):
        assert main.main(command) == 0
        err = capsys.readouterr().err.splitlines()
        assert err and all(line.startswith("study: ") and said in line for line in err)
    assert said in (folder / "report.html").read_text()


def test_a_panic_in_rust_is_a_sentence_too(folder, monkeypatch):
    """What has the right digest is parsed; one who forges it can still make the parser panic."""

    def panic(*_, **__):
        raise pl.exceptions.PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.warns(results.LeftOut, match="parquet is foreign"), pytest.raises(FileNotFoundError):
        results.read(folder).table()


def test_the_names_of_a_hostile_axis_value_do_not_hide_the_digest(folder):
    """Its minimum stands in the footer before the note."""
    mark = checksum._MARK.decode() + "0" * 64
    frame = pl.read_parquet(path(folder)).with_columns(pl.lit(mark).alias("path"))
    put(folder, 1, frame)
    assert results.read(folder).table().filter(pl.col("cell") == 1)["path"].unique().to_list() == [mark]


class Stop(Exception):
    pass


def again(folder, complete=lambda d: d, session=None):
    description = json.loads((folder / "study.json").read_text())
    return results.opened(folder, description, complete, session or {"started": "now"}, False)


@pytest.mark.parametrize("harm", [directory, lambda p: p.write_bytes(b"PAR1 torn"), HARM["is a copy of cell 0"]])
def test_a_study_sets_aside_what_is_in_a_cells_place(folder, harm):
    for name in ("00001.parquet.aside", "00001.parquet.aside1"):
        harm(path(folder))
        kept = path(folder).is_file() and path(folder).read_bytes()
        with pytest.warns(results.LeftOut, match=f"kept as {name}, and the cell is measured again"):  # noqa: SIM117
            with again(folder) as found:
                assert found.finished == [0, 2]
        assert (path(folder).with_name(name).is_file() and path(folder).with_name(name).read_bytes()) == kept
        good = path(made(folder.with_name(name))).read_bytes()
        found.store(1, good)
        assert found.finished == [0, 1, 2]


def test_a_finished_study_needs_no_writing(folder, monkeypatch, capsys):
    """On a read-only mount: nothing is written, and the table is there."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in ("replace", "rename", "mkdir", "unlink", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(files, "locked", refuse)
    with again(folder) as found:
        assert found.table().height == 18
    with pytest.raises(OSError, match=r"report: cannot write .*gradient.png: Read-only file system"):
        fnn.report.report(folder)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".part")}


def test_left_temporary_files_go_and_those_in_use_stay(folder):
    left = [folder / ".study.png.1.part", folder / ".x.part", folder / "cells" / ".00001.parquet.77.part"]
    for part in left:
        part.touch()
    held = folder / ".gradient.png.1.part"
    with open(held, "wb") as file:
        assert files.claim(file)
        with again(folder):
            assert not any(part.exists() for part in left) and held.exists()
    fnn.report.report(folder)
    assert not list(folder.rglob(".*.part"))


def test_a_full_disk_leaves_the_figure_that_was_there_and_names_it(folder, monkeypatch, capsys):
    fnn.report.report(folder)
    before = (folder / "gradient.png").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main.main(["report", str(folder)]) == 2
    assert "gradient.png: No space left on device" in capsys.readouterr().err
    with pytest.raises(OSError, match=r"report: cannot write .*gradient.png: No space left"):
        fnn.report.gradient(results.read(folder).table(), path=folder / "gradient.png")
    assert (folder / "gradient.png").read_bytes() == before and not list(folder.rglob(".*.part"))


def change(name, value):
    def harm(folder):
        description = json.loads((folder / "study.json").read_text())
        description[name] = value
        (folder / "study.json").write_text(json.dumps(description))

    return harm


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        *((write("study.json", text), "study.json") for text in ("3", "null", '"x"', "[]", "{}", "", '{"format": 6}')),
        *((write("study.json", text), "study.json") for text in ('{"format": {"a": 1}}', "[" * 10**5, "NaN", "1" * 5000)),
        *((write("sessions.json", text), "sessions.json") for text in ("3", "{}", "[1]", "[[]]", "[" * 10**5, "[null")),
        *((change("cells", value), "study.json") for value in (3, {}, [3], [{}], [{"static": {}, "runs": [3], "chunk": 1}])),
        *((change("axes", value), "study.json") for value in ([], {}, {"static": ["q"], "traced": []})),
        *((change("types", value), "study.json") for value in ([], {"depth": 3}, {"depth": "int"})),
        (change("types", AXES | {"depth": "decimal"}), "holds no finished cell"),
        (change("cells", []), "holds no finished cell"),
        (change("loss", "another"), "holds no finished cell"),
    ],
)  # fmt: skip
def test_wrong_content_is_a_sentence_and_exit_code_2(folder, harm, said, capsys):
    harm(folder)
    for command in (["report", str(folder)], ["compare", str(folder), str(folder)]):
        assert main.main(command) == 2
        err = capsys.readouterr().err.splitlines()
        assert said in err[-1] and all(line.startswith("study: ") and len(line) < 600 for line in err)


def test_names_and_values_cannot_steer_the_terminal(tmp_path, capsys):
    """Nor are they markup to the library that draws the table, or patterns to the one that reads files."""
    folders = [made(tmp_path / name) for name in ("[b]", "[/red]")]
    for shift, folder in enumerate(folders):
        assert results.read(folder).finished == [0, 1, 2]
        frame = (
            results.read(folder)._read(1).with_columns(pl.lit("[/b]\x1b]0;t\a").alias("path"), pl.col("value") + shift)
        )
        put(folder, 1, frame)
    assert main.main(["compare", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    assert "[/b]\\x1b]0;t\\x07" in shown and "[/red]" in shown and "\x1b" not in shown


@pytest.mark.usefixtures("page_alone")
def test_sessions_of_any_content_are_shown_as_they_are(folder):
    for session in ({}, {"versions": [3], "devices": {"a": 1}, "commit": 7}, {"versions": {"jax": None}, "devices": 3}):
        (folder / "sessions.json").write_text(json.dumps([session]))
        fnn.report.report(folder)
