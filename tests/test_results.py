"""Folders of studies: interrupted, killed, damaged, full; compared; and worked on by several processes."""

import errno
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import jax
import numpy as np
import polars as pl
import pytest

import fnn
import fnn.cli.main
from fnn import files
from fnn.study import results, study

# One worker: the tests share the fixtures, and those the compilations.
pytestmark = pytest.mark.xdist_group("results")


def tiny(**kwargs):
    """Three cells, measured at initialisation: the smallest programs."""
    grid = fnn.grid.product(activation=["tanh", "relu", "sigmoid"], depth=1, width=8, norm="none", batch_size=8)
    return study.Study(grid, **({"seeds": 3, "steps": 0, "data": "clusters"} | kwargs))


def arrays(name):
    """A set by name, as arrays."""
    return tuple(tuple(part) for part in fnn.data.load(name, key=jax.random.key(0)))


ARGUMENTS = [
    "study",
    "--activation",
    "tanh,relu,sigmoid",
    "--depth",
    "1",
    "--width",
    "8",
    "--norm",
    "none",
    "--batch-size",
    "8",
    "--seeds",
    "3",
    "--steps",
    "0",
    "--data",
    "clusters",
    "--out",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny().run(folder)
    return folder


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A folder with all three cells, to be damaged."""
    target = tmp_path / "study"
    (target / "cells").mkdir(parents=True)
    for path in (*undisturbed.glob("*.json"), *undisturbed.glob("cells/*.parquet")):
        (target / path.relative_to(undisturbed)).write_bytes(path.read_bytes())
    return target


def finished(folder):
    return sorted(path.name for path in (folder / "cells").glob("*.parquet"))


def test_the_folder_holds_what_was_asked_and_who_worked_on_it(undisturbed):
    found = results.read(undisturbed)
    assert found.finished == [0, 1, 2] and found.description["axes"]["traced"][0] == "seed"
    assert [c["static"]["activation"] for c in found.description["cells"]] == ["tanh", "relu", "sigmoid"]
    session = found.sessions[0]
    assert session["versions"]["jax"] == __import__("jax").__version__ and session["devices"] == ["cpu cpu"]
    assert {"started", "commit", "executor"} <= session.keys()
    times = found.times()
    assert times.columns == ["cell", "compile", "run", "draw", "tables"] and (times["run"] > 0).all()
    if importlib.util.find_spec("pandas") and importlib.util.find_spec("pyarrow"):
        assert found.table().to_pandas().shape == found.table().shape
    assert not list(undisturbed.rglob("*.part"))


def test_finished_cells_are_not_run_again(copied, monkeypatch):
    monkeypatch.setattr(study, "work", None)  # whatever would run a cell fails
    before = results.read(copied).table()
    again = tiny().run(copied)
    assert again.table().equals(before) and len(again.sessions) == 1  # nobody had to work on it


def test_a_missing_cell_is_measured_again_to_the_last_bit(copied):
    before = results.read(copied).table()
    (copied / "cells" / "00001.parquet").unlink()
    assert tiny().run(copied).table().equals(before)


def test_chunks_of_the_folder_are_reused_and_others_refused(copied, monkeypatch):
    monkeypatch.setattr(fnn.study.budget, "chunk_size", None)  # would be called for a new study
    tiny().run(copied)
    with pytest.raises(ValueError, match="chunk is 1 there, 2 here"):
        tiny(chunk=2).run(copied)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"seeds": 4}, "seed is 0, 1, 2 there, 0, 1, 2, 3 here"),
        ({"steps": 3}, "steps is 0 there, 0, 3 here"),
        ({"data": "spirals"}, "data is"),
        ({"grid": fnn.grid.product(activation="tanh", depth=1, width=8, norm="none", batch_size=8)}, "activation is tanh, relu, sigmoid there, tanh here"),
    ],
)  # fmt: skip
def test_another_study_is_refused_with_the_difference(undisturbed, other, difference):
    described = study.Study(**{"grid": tiny().grid, "seeds": 3, "steps": 0, "data": "clusters"} | other)
    with pytest.raises(ValueError, match=difference):
        described.run(undisturbed)


def damage(path, content=b"PAR1 garbage"):
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda f: damage(f / "study.json", b'{"format": 2, "cells": ['), "study.json is damaged"),
        (lambda f: damage(f / "study.json", b"[]"), "study.json is damaged"),
        (lambda f: damage(f / "study.json", b'{"format": 1}'), "must have format 6, got 1"),
        (lambda f: damage(f / "study.json", b'{"format": 6}'), "study.json is damaged (it must have 'axes')"),
        (
            lambda f: damage(f / "study.json", b'{"format": ' + b"[" * 99_999),
            "study.json is damaged (nested too deeply)",
        ),
        (lambda f: damage(f / "sessions.json", b"[" * 99_999), "sessions.json is damaged (nested too deeply)"),
        (
            lambda f: damage(f / "sessions.json", b"[[]]"),
            "sessions.json is damaged (it[0] must be of type dict, got list)",
        ),
        (lambda f: damage(f / "study.json", b"\xff\xfe"), "study.json is damaged"),
        (lambda f: damage(f / "sessions.json", b"{}"), "sessions.json is damaged"),
        (lambda f: (f / "study.json").unlink(), "holds cells but no study.json"),
    ],
)
def test_damage_is_one_sentence_and_exit_code_2_and_nothing_is_lost(copied, harm, sentence, capsys):
    harm(copied)
    (copied / "cells" / "00002.parquet").unlink()  # something is left to do
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert fnn.cli.main.main([*ARGUMENTS, str(copied)]) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert before.items() <= {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}.items()


def test_a_full_disk_loses_no_finished_cell(tmp_path, monkeypatch, capsys, undisturbed):
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:  # study.json, sessions.json and the first cell find room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert fnn.cli.main.main([*ARGUMENTS, str(tmp_path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write" in last and "No space left on device" in last
    assert finished(tmp_path) == ["00000.parquet"] and not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    assert tiny().run(tmp_path).table().equals(results.read(undisturbed).table())


def test_a_finished_study_on_a_read_only_mount_prints_its_table(copied, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise files.cannot_write(path, OSError(errno.EROFS, os.strerror(errno.EROFS)))

    monkeypatch.setattr(files, "write", refuse)
    monkeypatch.setattr(files, "locked", refuse)
    assert fnn.cli.main.main([*ARGUMENTS, str(copied)]) == 0
    shown = capsys.readouterr()
    assert "keeps its size" in shown.out and "figure study.png" not in shown.out
    assert "study.png: Read-only file system" in shown.err.splitlines()[-1]
    (copied / "cells" / "00001.parquet").unlink()  # now there is something to measure
    assert fnn.cli.main.main([*ARGUMENTS, str(copied)]) == 2
    assert "Read-only file system" in capsys.readouterr().err.splitlines()[-1]


def test_damaged_and_foreign_cells_are_named_set_aside_and_measured_again(copied, undisturbed, capsys):
    (copied / "cells" / "00000.parquet").replace(copied / "cells" / "00002.parquet")
    damage(copied / "cells" / "00001.parquet")
    assert fnn.cli.main.main([*ARGUMENTS, str(copied)]) == 0
    err = capsys.readouterr().err
    assert "00001.parquet is damaged or foreign (it holds no SHA-256); it is kept as 00001.parquet.aside" in err
    assert "00002.parquet is a copy of cell 0; it is kept as 00002.parquet.aside" in err
    assert results.read(copied).table().equals(results.read(undisturbed).table())


def test_one_folder_serves_one_run_at_a_time(copied):
    (copied / "cells" / "00001.parquet").unlink()
    with files.locked(copied), pytest.raises(OSError, match="in use by another run"):
        tiny().run(copied)
    with pytest.raises(OSError, match="cannot write"):
        tiny().run("/dev/null/x")


def test_ctrl_c_here_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    work, seen = study.work, []

    def interrupted(task):
        seen.append(task.number)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return work(task)

    monkeypatch.setattr(study, "work", interrupted)
    assert fnn.cli.main.main([*ARGUMENTS, str(tmp_path)]) == 130
    shown = capsys.readouterr()
    assert "the same command resumes" in shown.err and finished(tmp_path) == ["00000.parquet"]
    assert "tanh" in shown.out and "relu" not in shown.out and (tmp_path / "study.png").exists()


def test_what_is_finished_comes_with_what_stops_a_study_in_memory(monkeypatch, undisturbed):
    frames = [path.read_bytes() for path in sorted(undisturbed.glob("cells/*.parquet"))]
    for error in (KeyboardInterrupt, ValueError):

        def stopped(task, error=error):
            if task.number == 2:
                raise error
            return frames[task.number], {"compile": 0.0, "run": 0.0}

        monkeypatch.setattr(study, "work", stopped)
        with pytest.raises(error) as caught:
            tiny().run()
        assert caught.value.results.table()["cell"].unique().to_list() == [0, 1]


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_interrupts_and_kills_end_in_the_undisturbed_table(kill, tmp_path, undisturbed):
    """Two workers: Ctrl-C in their first second, `kill -9` after the next cell, then to the end.

    What a kill may leave, temporary files and damaged cells, is in test_cells.
    """
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fnn", *ARGUMENTS, str(out), "--workers", "2", "--cache", str(tmp_path / "xla")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def until(holds, process):
        while not holds() and process.poll() is None:
            time.sleep(0.02)

    # As a terminal sends it, to parent and workers: what was begun is finished and shown, nothing else is begun.
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    until((out / "sessions.json").exists, process)  # the workers are started next
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    shown, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert 1 <= len(finished(out)) <= 2 and "the same command resumes" in err
    assert "keeps its size" in shown and "tanh" in shown and (out / "study.png").exists()
    if kill:
        for name in finished(out)[1:]:
            (out / "cells" / name).unlink()
        process = subprocess.Popen(command, **pipes)
        until(lambda: len(finished(out)) >= 2, process)
        process.kill()
        process.communicate(timeout=120)
    assert list((tmp_path / "xla").iterdir())
    assert tiny().run(out).table().equals(results.read(undisturbed).table())
    assert not list(out.rglob("*.part"))


def test_executors_of_all_kinds(undisturbed):
    table = results.read(undisturbed).table()
    with ThreadPoolExecutor(2) as executor:
        assert tiny().run(executor=executor).table().equals(table)
    fork = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    with pytest.raises(ValueError, match="forked processes hangs"):
        tiny().run(executor=fork)
    with pytest.raises(TypeError, match=r"client.get_executor\(\)"):
        tiny().run(executor=3)


@pytest.mark.slow  # executors of other kinds, and tasks that are pickled, have their tests
@pytest.mark.filterwarnings("default")
def test_a_dask_cluster(tmp_path, undisturbed):
    """One process with two threads; the tasks name their data instead of holding them."""
    from distributed import Client, LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        found = tiny().run(tmp_path / "out", executor=client.get_executor())
    assert found.sessions[0]["executor"] == "ClientExecutor"
    ours, theirs = results.read(undisturbed).table(), found.table()
    assert ours.drop("value").equals(theirs.drop("value"))
    np.testing.assert_allclose(ours["value"], theirs["value"], rtol=1e-5)


def test_compare_finds_what_differs_beyond_the_seeds(undisturbed, tmp_path, capsys):
    table = results.read(undisturbed).table()
    same = fnn.compare(table, undisturbed)
    assert not same["beyond"].any() and (same["difference"] == 0).all()
    assert same["seeds_a"].unique().to_list() == [3]
    # A study that differs in one axis: that axis is what is compared.
    moved = table.with_columns(
        pl.lit(2.0).alias("sigma_w"),
        pl.when(pl.col("quantity") == "log10_error")
        .then(pl.col("value") + 9)
        .otherwise(pl.col("value"))
        .alias("value"),
    )
    joined = fnn.compare(table, moved)
    assert set(joined.filter("beyond")["quantity"]) == {"log10_error"} and joined["beyond"][0]
    np.testing.assert_allclose(joined.filter("beyond")["difference"], 9)
    row = joined.filter(pl.col("beyond")).row(0, named=True)
    values = table.filter(
        (pl.col("activation") == row["activation"]) & (pl.col("path") == row["path"]) & (pl.col("quantity") == "log10_error")
    )["value"].to_numpy()  # fmt: skip
    np.testing.assert_allclose([row["a"], row["a_low"], row["a_high"]], np.quantile(values, [0.5, 0.1, 0.9]))
    with pytest.raises(ValueError, match="must share a row"):
        fnn.compare(table, table.with_columns(pl.lit("x").alias("path")))
    with pytest.raises(
        ValueError, match="activation must have one type in both studies, got String in a and Int32 in b"
    ):
        fnn.compare(table, table.with_columns(activation=pl.col("cell")))
    assert fnn.compare(table, table.with_columns(pl.col("width").cast(pl.Float64))).height == same.height
    with pytest.raises(ValueError, match="without the column step"):
        fnn.compare(table, table.drop("step"))
    named = table.rename({"width": "a", "norm": "beyond"})  # axes of one's own may be called anything
    assert fnn.compare(named, named)["a (axis)"].unique().to_list() == [8]
    assert fnn.cli.main.main(["compare", str(undisturbed), str(undisturbed)]) == 0
    assert "0 of" in capsys.readouterr().out
    assert fnn.cli.main.main(["compare", str(undisturbed), str(tmp_path)]) == 2
    assert "must hold a study" in capsys.readouterr().err


def test_descriptions_are_json_and_have_names():
    description = tiny().describe()
    assert json.loads(json.dumps(description)) == description
    assert results.key(description) != results.key(tiny(seeds=4).describe())
