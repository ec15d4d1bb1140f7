"""Loggers: what `fit` gives them, the files they write, and what is left of these after a crash and a resumption."""

import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

import fnn
from fnn.training import log as loggers

NET = fnn.serial(fnn.dense(4), fnn.tap(), fnn.activation("tanh"), fnn.repeat(fnn.dense(4), 2), fnn.dense(3))
OPTIMIZER = optax.adam(1e-2)
STEP = fnn.train_step(NET, fnn.losses.cross_entropy, OPTIMIZER, per_layer=True)
RNG = np.random.default_rng(0)
Y = np.arange(48, dtype=np.int32) % 3
X = np.asarray(RNG.normal(size=(48, 4)) + 3 * np.eye(4)[Y], np.float32)
KEY = jax.random.key(0)
STATE = fnn.TrainState.create(NET, OPTIMIZER, KEY, X)
OPTIONS = {"batch_size": 4, "key": KEY, "validation": (X, Y), "log_every": 5}


class Wandb:
    """The shape of a wandb run, which refuses steps that go back."""

    def __init__(self):
        self.rows = []

    def log(self, data, step=None, commit=None):
        assert all(type(value) is float for value in data.values())
        assert not self.rows or step >= self.rows[-1][0]
        self.rows.append((step, dict(data)))


def records(folder):
    """Read event files as TensorBoard does: (step, tag) -> value; a run that goes on drops the rows it writes again."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    found = {}
    for path in sorted(Path(folder).glob("*.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at + 12 <= len(content):
            (size,), (crc,) = struct.unpack("<Q", content[at : at + 8]), struct.unpack("<I", content[at + 8 : at + 12])
            assert crc == masked(content[at : at + 8])
            data = content[at + 12 : at + 12 + size]
            assert struct.unpack("<I", content[at + 12 + size : at + 16 + size])[0] == masked(data)
            event, at = Event.FromString(data), at + 16 + size
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.simple_value
    return found


def read(frame):
    assert frame.columns == ["step", "name", "value"]
    rows = {(step, name): value for step, name, value in frame.sort("step", maintain_order=True).iter_rows()}
    assert len(rows) == len(frame)
    return rows


def test_every_logger_gets_the_same_rows_as_the_history(tmp_path):
    run = Wandb()
    given = [
        run,
        fnn.log.csv(tmp_path / "a" / "run.csv"),
        fnn.log.parquet(tmp_path / "p"),
        fnn.log.tensorboard(tmp_path / "t"),
    ]
    _, history = fnn.fit(STEP, STATE, (X, Y), epochs=2, log=given, **OPTIONS)
    assert [step for step, _ in run.rows] == [5, 10, 12, 15, 20, 24]
    rows = dict(run.rows)
    for step in (5, 10, 15, 20):
        assert rows[step]["loss"] == history.train["loss"][step - 1]
        assert rows[step]["grad_norms/3/[1]/kernel"] == history.train["grad_norms"][3].blocks["kernel"][step - 1, 1]
        assert rows[step]["taps/1/second_moment"] > 0 and "taps/1/log10_error" in rows[step]
    for epoch, step in enumerate((12, 24)):
        assert rows[step] == {f"validation/{name}": v[epoch] for name, v in history.validation.items()}
    expected = {(step, name): value for step, row in run.rows for name, value in row.items()}
    assert read(pl.read_csv(tmp_path / "a" / "run.csv")) == expected == read(pl.read_parquet(tmp_path / "p"))
    found = records(tmp_path / "t")
    assert found == {key: float(np.float32(value)) for key, value in expected.items()}
    wide = pl.read_csv(tmp_path / "a" / "run.csv").pivot("name", index="step", values="value")
    assert wide["loss"].drop_nulls().to_list() == [history.train["loss"][step - 1] for step in (5, 10, 15, 20)]


def test_logging_changes_no_number(tmp_path):
    (one, plain), (two, logged) = (
        fnn.fit(STEP, STATE, (X, Y), epochs=1, **{**OPTIONS, "log": given})
        for given in (None, fnn.log.csv(tmp_path / "a"))
    )
    jax.tree.map(np.testing.assert_array_equal, (one.params, plain.train["loss"]), (two.params, logged.train["loss"]))


def test_batches_from_outside_and_steps_one_by_one_log_alike():
    runs = []
    for options in ({"scan": True}, {"scan": False}):
        runs.append(Wandb())
        batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 48, 4)]
        fnn.fit(STEP, STATE, batches, epochs=2, log=runs[-1], log_every=7, **options)
    assert [[step for step, _ in run.rows] for run in runs] == [[7, 14, 21]] * 2
    np.testing.assert_allclose(*([row["loss"] for _, row in run.rows] for run in runs), rtol=1e-5)


@pytest.mark.parametrize("kind", ["csv", "parquet", "tensorboard"])
def test_a_run_that_goes_on_has_each_row_once(kind, tmp_path):
    """It got to step 24, the state that is left is that of step 12."""
    path = tmp_path / "log"
    middle, _ = fnn.fit(STEP, STATE, (X, Y), epochs=1, **OPTIONS)
    make = getattr(fnn.log, kind)
    fnn.fit(STEP, STATE, (X, Y), epochs=2, log=make(path), **OPTIONS)
    run = Wandb()
    fnn.fit(STEP, middle, (X, Y), epochs=1, log=[make(path), run], **OPTIONS)
    readers = {"csv": lambda: read(pl.read_csv(path)), "parquet": lambda: read(pl.read_parquet(path))}
    found = readers.get(kind, lambda: records(path))()
    assert sorted({step for step, _ in found}) == [5, 10, 12, 15, 20, 24]
    for step, row in run.rows:
        assert found[step, next(iter(row))] == pytest.approx(next(iter(row.values())), rel=1e-6)
    # A new run from the start: what was there is kept aside, or is behind a mark that drops it.
    fnn.fit(STEP, STATE, (X, Y), epochs=1, log=make(path), **OPTIONS)
    found = readers.get(kind, lambda: records(path))()
    assert sorted({step for step, _ in found}) == [5, 10, 12]
    assert (tmp_path / "log.aside").exists() == (kind != "tensorboard")


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "run.csv"
    path.write_bytes(b"step,name,value\n1,loss,0.5\n2,loss,0.2")
    logger = fnn.log.csv(path)
    logger.log({"loss": 0.25}, step=2)
    assert path.read_text() == "step,name,value\n1,loss,0.5\n2,loss,0.25\n"
    logger.resume(1)
    assert path.read_text() == "step,name,value\n1,loss,0.5\n"
    logger.log({'a,"b"': float("nan")}, step=3)
    logger.log({"loss": float("inf")}, step=4)
    table = pl.read_csv(path)
    assert list(table["name"]) == ["loss", 'a,"b"', "loss"]
    assert table["value"].dtype == pl.Float64 and table["value"].is_nan().to_list() == [False, True, False]


def test_killed_while_it_logs(tmp_path):
    """kill -9: what was logged is there, whole, and the run goes on from any step before."""
    code = """
        import sys, fnn
        given = [fnn.log.csv(sys.argv[1] + "/run.csv"), fnn.log.parquet(sys.argv[1] + "/p"), fnn.log.tensorboard(sys.argv[1] + "/t")]
        for step in range(1, 10**6):
            for logger in given:
                logger.log({"loss": 1 / step, "x": {"y": step}}, step=step)
            if step % 50 == 0:
                for logger in given:
                    logger.flush()
                print(step, flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    reached = 0
    assert child.stdout is not None
    for line in child.stdout:
        reached = int(line)
        if reached >= 200:
            break
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    expected = {(step, name): value for step in range(1, 201) for name, value in (("loss", 1 / step), ("x/y", step))}
    for logger in (fnn.log.csv(tmp_path / "run.csv"), fnn.log.parquet(tmp_path / "p")):
        logger.resume(200)
    assert read(pl.read_csv(tmp_path / "run.csv")) == expected == read(pl.read_parquet(tmp_path / "p"))
    (events,) = (tmp_path / "t").glob("*.tfevents.*")
    content = events.read_bytes()
    assert len(content) > 200 * 2 * 10
    logger = fnn.log.tensorboard(tmp_path / "t2")
    logger.log({"loss": 1.0}, step=1)
    logger.close()
    assert records(tmp_path / "t2") == {(1, "loss"): 1.0}


def test_an_interrupted_run_has_logged_what_it_finished(tmp_path):
    class Stop(Exception):
        pass

    def batches():
        for i in range(12):
            if i == 9:
                raise Stop
            yield X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]

    with pytest.raises(Stop):
        fnn.fit(STEP, STATE, batches(), epochs=1, scan=False, log=fnn.log.csv(tmp_path / "run.csv"), log_every=4)
    assert pl.read_csv(tmp_path / "run.csv")["step"].unique().sort().to_list() == [4, 8]


def test_watch_rows_have_the_same_names_in_files(tmp_path):
    params, state = NET.init(KEY, X)

    def loss(params, batch):
        return jnp.mean(fnn.losses.cross_entropy(NET.apply(params, state, batch[0])[0], batch[1]))

    flow = fnn.watch(loss)(params, (X, Y))
    logger = fnn.log.csv(tmp_path / "run.csv")
    logger.log(flow.flat(), step=3)
    assert read(pl.read_csv(tmp_path / "run.csv")) == {(3, name): value for name, value in flow.flat().items()}


def test_flat_names_leaves_by_their_paths():
    metrics = {
        "a": np.float32(1.5),
        "b": {"c": jnp.ones(()), "d": [2, np.zeros(3)]},
        "s": fnn.tree.Stacked(np.arange(2.0)),
    }
    assert loggers.flat(metrics) == {"a": 1.5, "b/c": 1.0, "b/d/0": 2.0, "s/[0]": 0.0, "s/[1]": 1.0}


def test_what_is_no_logger_and_what_is_missing_is_said_in_a_sentence(tmp_path, monkeypatch):
    for wrong in (print, "run.csv", Wandb):
        with pytest.raises(TypeError, match=r"fit: a logger must have \.log\(dict, step=\), got"):
            fnn.fit(STEP, STATE, (X, Y), epochs=1, log=wrong, **OPTIONS)
    with pytest.raises(ValueError, match="fit: log_every must be a positive integer, got 0"):
        fnn.fit(STEP, STATE, (X, Y), epochs=1, log=Wandb(), **{**OPTIONS, "log_every": 0})
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must hold the columns step, name, value, got a, b; choose another path"):
        fnn.fit(STEP, STATE, (X, Y), epochs=1, log=fnn.log.csv(tmp_path / "other.csv"), **OPTIONS)
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"log\.tensorboard: needs tensorboardX; install fnn\[log\]"):
        fnn.log.tensorboard(tmp_path)


def test_a_log_in_the_folder_of_a_checkpoint_is_refused_at_once(tmp_path):
    """Else a run that is killed before its first save could not go on: its folder would hold something else."""
    for logger in (
        fnn.log.csv(tmp_path / "run" / "log.csv"),
        fnn.log.parquet(tmp_path / "run"),
        fnn.log.tensorboard(tmp_path / "run" / "a" / "events"),
    ):
        with pytest.raises(
            ValueError, match="^fit: a checkpoint's folder must hold nothing else, got .*run with the log"
        ):
            fnn.fit(STEP, STATE, (X, Y), epochs=1, **OPTIONS, checkpoint=tmp_path / "run", log=[logger])
    assert not (tmp_path / "run").exists()
