"""Run tasks in this process, in spawned processes, or on any `concurrent.futures.Executor`."""

import os
import pickle
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fnn import files, lowering

CONFIG = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


class Unreachable(OSError):
    """Raised in a process that cannot read the file of a `Shared`."""


class Shared(NamedTuple):
    """A value that tasks name instead of carrying it: every process reads its file once."""

    path: str

    def load(self) -> Any:
        """Return the value. Errors: Unreachable."""
        value = _LOADED.get(self.path)
        if value is None:
            try:
                value = pickle.loads(Path(self.path).read_bytes())
            except OSError as error:
                raise Unreachable(f"study: cannot read {self.path}: {error.strerror or error}") from None
            _LOADED.clear()  # one value at a time, however many studies a worker lives through
            _LOADED[self.path] = value
        return value


_LOADED: dict[str, Any] = {}


@contextmanager
def shared(value: Any, folder: str | os.PathLike[str] | None) -> Iterator[Shared]:
    """Keep a value in a temporary file, in `folder` or in the system's, for the processes that tasks are sent to."""
    path = Path(folder or tempfile.gettempdir()).absolute() / f".shared.{uuid.uuid4().hex}.part"
    try:
        with open(path, "wb") as file:
            files.claim(file)
            try:
                pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
                file.flush()
            except OSError as error:
                raise files.cannot_write(path, error) from None
            _LOADED[os.fspath(path)] = value  # for threads of this process
            yield Shared(os.fspath(path))
    finally:
        _LOADED.pop(os.fspath(path), None)
        path.unlink(missing_ok=True)


class Interrupted(KeyboardInterrupt):
    """Raised when Ctrl-C has stopped a study."""

    at_once = False
    """Whether it was pressed twice, so that cells may still be running."""
    results: Any = None
    """Those of the finished cells."""


@contextmanager
def compilation_cache(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Let JAX keep compiled programs in a folder, for the next process that needs them; None changes nothing."""
    if folder is None:
        yield
        return
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    values = (os.fspath(folder), 0.0, -1)
    before = {name: getattr(jax.config, name) for name in CONFIG[2:]}
    for name, value in zip(before, values, strict=True):
        jax.config.update(name, value)
    reset_cache()  # JAX looks at the settings once, when it first compiles
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


class Pool(Executor):
    """Worker processes, each of which goes on with tasks of the `kind` that it began: what it compiled serves them all."""

    def __init__(self, executors: Sequence[Any]):
        self._executors, self._max_workers = executors, len(executors)
        self._kinds: list[Any] = [None] * len(executors)
        self._futures: list[Any] = [None] * len(executors)

    def choose(self, tasks: Sequence[Any]) -> int:
        """Choose the next task for a free worker: of the kind it has compiled, else of a kind that no worker has begun."""
        kinds, own = [getattr(task, "kind", None) for task in tasks], self._kinds[self._free()]
        if own is not None and own in kinds:
            return kinds.index(own)
        return next((i for i, kind in enumerate(kinds) if kind is None or kind not in self._kinds), 0)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand a task to a free worker."""
        worker = self._free()
        self._kinds[worker] = getattr(args[0], "kind", None) if args else None
        with _sigint_blocked():  # a worker may be started here; it inherits the blocked signals
            self._futures[worker] = self._executors[worker].submit(fn, *args, **kwargs)
        return self._futures[worker]

    def terminate(self) -> None:
        """End the processes, whatever they are doing."""
        for executor in self._executors:
            for process in list((executor._processes or {}).values()):
                process.terminate()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the processes end."""
        for executor in self._executors:
            executor.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _free(self) -> int:
        idle = (i for i, future in enumerate(self._futures) if future is None or future.done())
        return next(idle, 0)


@contextmanager
def pool(workers: int) -> Iterator[Pool]:
    """Start worker processes that share this process's JAX settings and default device, ignore Ctrl-C, and die with their parent.

    They are spawned: a fork of a process in which JAX has started threads hangs.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    more, device = lowering.worker_settings()
    settings = {name: getattr(jax.config, name) for name in CONFIG} | more
    context = multiprocessing.get_context("spawn")
    options: Any = {"mp_context": context, "initializer": _start, "initargs": (settings, device)}
    executor = Pool([ProcessPoolExecutor(1, **options) for _ in range(workers)])
    try:
        yield executor
    except BaseException:  # without this, the process could not end before the tasks in flight
        executor.terminate()
        raise
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block Ctrl-C in every process that is started meanwhile, for good, where the system can.

    A worker ignores Ctrl-C once its first line has run, but it spends a second importing before that.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _counted_sigint() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list, instead of raising KeyboardInterrupt wherever the program happens to be.

    So no result is lost between a worker's answer and the folder. Only the main thread gets Ctrl-C.
    """
    presses: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield presses
        return
    signal.signal(signal.SIGINT, lambda number, _: presses.append(number))
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


def _start(settings: dict[str, Any], device: int | None) -> None:
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, value in settings.items():
        jax.config.update(name, value)
    if device is not None:
        jax.config.update("jax_default_device", jax.local_devices()[device])
    parent = multiprocessing.parent_process()

    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()  # returns also where the parent was killed
    os._exit(1)


def check_executor(executor: Any) -> None:
    """Refuse what is not an executor, and pools of forked processes.

    Errors: TypeError, ValueError.
    """
    if not isinstance(executor, Executor):
        raise TypeError(
            f"study: executor must be a concurrent.futures.Executor, got {type(executor).__name__}; of a Dask client "
            "pass client.get_executor()"
        )
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ValueError(
            "study: a pool of forked processes hangs once JAX has started threads, got start method 'fork'; pass "
            "ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn')), or workers=2"
        )


def drive(
    tasks: Sequence[Any],
    work: Callable[[Any], Any],
    done: Callable[[Any, Any], None],
    executor: Executor | None,
    running: Callable[[int], None],
    whole: Callable[[Any], Any] = lambda task: task,
) -> None:
    """Call `done(task, work(task))` for every task, as they finish; `done` runs here, one at a time.

    `whole` makes a task that carries all it needs, for a worker on another machine that cannot read a `Shared`.
    An executor that says how many workers it has is given that many tasks at a time, because a task in the queue of a
    pool of processes can no longer be cancelled. After Ctrl-C no further task starts, those in flight are waited for, and
    Interrupted is raised; a second Ctrl-C does not wait. An error in a task stops the rest in the same way; the first
    error is raised.
    """
    if executor is None:
        try:
            for task in tasks:
                running(1)
                done(task, work(task))
        except KeyboardInterrupt:
            raise Interrupted from None
        return
    width = getattr(executor, "_max_workers", None) or len(tasks)
    choose = executor.choose if isinstance(executor, Pool) else lambda _: 0
    waiting, flying, failure, told = list(tasks), {}, None, False
    with _counted_sigint() as presses:
        try:
            while True:
                while waiting and len(flying) < width and not failure and not presses:
                    task = waiting.pop(choose(waiting))
                    flying[executor.submit(work, task)] = task
                if not flying:
                    break
                running(sum(future.running() for future in flying))
                for future in wait(flying, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    task = flying.pop(future)
                    if not future.cancelled() and isinstance(future.exception(), Unreachable):
                        flying[executor.submit(work, whole(task))] = task
                        continue
                    wrong = _finish(future, task, done)
                    failure = failure or wrong
                if presses and not told:
                    words = "finishing the cells in flight; Ctrl-C again stops at once"
                    print(f"\nstudy: {words}", file=sys.stderr, flush=True)
                    failure, told = failure or Interrupted(), True
                if len(presses) > 1:
                    break
                if failure:
                    flying = {future: task for future, task in flying.items() if not future.cancel()}
        except BrokenExecutor as error:  # at once on submit
            failure = failure or _died(error)
        finally:
            for future in flying:
                future.cancel()
    if presses:
        failure = failure or Interrupted()
    if isinstance(failure, Interrupted):
        failure.at_once = len(presses) > 1
    if failure:
        raise failure


def _finish(future: Future[Any], task: Any, done: Callable[[Any, Any], None]) -> BaseException | None:
    """Hand a finished task's result on; return what went wrong, with the task or with storing it."""
    if future.cancelled():
        return None
    if (error := future.exception()) is None:
        try:
            done(task, future.result())
        except OSError as unwritten:
            return unwritten
    elif isinstance(error, BrokenExecutor):
        return _died(error)
    elif isinstance(error, KeyboardInterrupt):  # in a worker of somebody's own pool
        return Interrupted()
    return error


def _died(error: BaseException) -> OSError:
    return OSError(
        f"study: a worker process died, perhaps because memory ran out ({error}); use fewer workers or a smaller chunk: "
        "what is finished stays, and the same command resumes"
    )
