"""Workers: what Ctrl-C, a second one, and failures leave done, running, and never begun."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_results import tiny

from fnn.study import workers


class Queueing(Executor):
    """Two workers and a queue of three, whose tasks nobody can cancel any more: as a pool of processes is."""

    _max_workers = 2

    def __init__(self):
        self.begun, self.lock, self.places = [], threading.Lock(), threading.Semaphore(2)
        self.taken = 0

    def submit(self, function, task):
        future = Future()
        self.taken += 1
        if self.taken <= 5:
            future.set_running_or_notify_cancel()

        def run():
            with self.places:
                if not future.running() and not future.set_running_or_notify_cancel():
                    return
                self.begun.append(task)
                try:
                    future.set_result(function(task))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def drive(work, done, executor, tasks=range(6)):
    workers.drive(tasks, work, done, executor, lambda count: None)


def test_all_tasks_are_done_once_and_no_more_are_out_than_there_are_workers():
    executor, found, out = Queueing(), [], []

    def work(task):
        out.append(executor.taken - len(found))
        return task**2

    drive(work, lambda task, result: found.append((task, result)), executor)
    assert sorted(found) == [(n, n**2) for n in range(6)] and max(out) <= 2


def test_ctrl_c_finishes_what_is_in_flight_and_begins_nothing(capsys):
    executor, found = Queueing(), []

    def work(task):
        time.sleep(0.05)
        return task

    def done(task, result):
        found.append(task)
        if len(found) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of storing a cell: it must not be lost
            time.sleep(0.01)
            found.append("stored")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(workers.Interrupted) as caught:
        drive(work, done, executor)
    assert signal.getsignal(signal.SIGINT) is before and not caught.value.at_once
    assert "stored" in found and len(executor.begun) <= 4  # two done, and two at most beside them
    assert sorted(found[:2] + found[3:]) == sorted(executor.begun)
    assert "finishing the cells in flight" in capsys.readouterr().err


def test_ctrl_c_twice_does_not_wait():
    executor, release = Queueing(), threading.Event()

    def work(task):
        if task == 0:
            for _ in range(2):
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGINT)
        release.wait(20)

    started = time.monotonic()
    with pytest.raises(workers.Interrupted) as caught:
        drive(work, lambda *_: None, executor)
    assert caught.value.at_once and time.monotonic() - started < 10
    release.set()


@pytest.mark.parametrize("error", [ValueError("odd"), OSError("full"), KeyboardInterrupt()])
def test_a_failure_begins_nothing_and_stores_what_is_in_flight(error):
    executor, found = Queueing(), []

    def work(task):
        if task == 0:
            raise error
        time.sleep(0.2)
        return task

    with pytest.raises(workers.Interrupted if isinstance(error, KeyboardInterrupt) else type(error)):
        drive(work, lambda task, _: found.append(task), executor)
    assert executor.begun == [0, 1] and found == [1]


def test_the_first_failure_is_the_one_that_is_raised_and_a_full_disk_is_one():
    executor, tried = Queueing(), []

    def full(task, _):
        tried.append(task)
        raise OSError(f"no room for {task}")

    with pytest.raises(OSError, match="no room for 0"):
        drive(lambda task: time.sleep(0.1 * task), full, executor)
    assert tried == [0, 1]  # room may have come


def test_ctrl_c_here_is_interrupted_whether_it_hits_the_work_or_the_storing():
    def interrupt(*_):
        raise KeyboardInterrupt

    for work, done in ((interrupt, print), (abs, interrupt)):
        with pytest.raises(workers.Interrupted):
            drive(work, done, None)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_workers_get_no_ctrl_c_and_are_not_waited_for_when_all_is_broken_off():
    before, others = signal.pthread_sigmask(signal.SIG_BLOCK, []), set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError), workers.pool(1) as executor:
        future = executor.submit(time.sleep, 60)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        (process,) = set(multiprocessing.active_children()) - others  # what earlier tests left may still be ending
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        assert int(status["SigBlk"], 16) >> (signal.SIGINT - 1) & 1  # from its first moment on
        raise ZeroDivisionError
    process.join(60)
    for _ in range(100):  # the pool's own thread waits for it too, and may be told first
        if process.exitcode is not None:
            break
        time.sleep(0.1)
    assert process.exitcode == -signal.SIGTERM
    assert isinstance(future.exception(10), BrokenExecutor)


class Recording(ThreadPoolExecutor):
    """Threads that are told what they would be sent as processes, and do it from its bytes."""

    def __init__(self, reads=True):
        super().__init__(2)
        self.sizes, self.reads = [], reads

    def submit(self, work, task):
        content = pickle.dumps(task)
        self.sizes.append(len(content))
        if not self.reads:  # as on a machine without the file
            workers._LOADED.clear()
            for part in Path(tempfile.gettempdir()).glob(".shared.*.part"):
                part.unlink()
        return super().submit(work, pickle.loads(content))


@pytest.mark.xdist_group("results")  # its programs are compiled there
def test_a_task_names_its_data_and_takes_it_along_only_where_the_file_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, y = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32), np.arange(4000) % 2
    sizes, tables = {}, {}
    for n, reads in ((40, True), (4000, True), (4000, False)):
        with Recording(reads) as executor:
            tables[n, reads] = tiny(data=(x[:n], y[:n])).run(executor=executor).table()
        sizes[n, reads] = executor.sizes
        assert not list(tmp_path.iterdir())
    assert sizes[40, True] == sizes[4000, True] and len(sizes[40, True]) == 3
    assert sorted(sizes[4000, False])[:3] == sorted(sizes[4000, True]) and len(sizes[4000, False]) == 6
    assert min(sorted(sizes[4000, False])[3:]) > x.nbytes  # sent again, with the data
    assert tables[4000, True].equals(tables[4000, False]) and not tables[40, True].equals(tables[4000, True])


def test_a_worker_that_dies_is_a_sentence():
    with workers.pool(1) as executor, pytest.raises(OSError, match="a worker process died"):
        workers.drive([9], os._exit, lambda *_: None, executor, lambda _: None)
