"""`fit`: epochs of training steps, in compiled stretches, and the curves of a run."""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fnn import check
from fnn.datasets.dataset import Data, Dataset
from fnn.progress import Progress
from fnn.training import placement
from fnn.training.averages import check_evaluated
from fnn.training.batches import FromBatches, checksum
from fnn.training.checkpoint import Checkpoint, key_numbers
from fnn.training.feed import InMemory, prepare
from fnn.training.history import History
from fnn.training.hooks import Hook, HookFunction, after_epoch, after_steps, collect
from fnn.training.log import Logger, Loggers
from fnn.training.metrics import averages
from fnn.training.recorder import Recorder
from fnn.training.run import Run
from fnn.training.step import TrainState, TrainStep, check_state
from fnn.tree import PyTree


@placement.within
def fit(
    step: TrainStep,
    state: TrainState,
    train: Data,
    *,
    epochs: int,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    validation: Data | float | None = None,
    patience: int | None = None,
    progress: bool | None = None,
    scan: bool = True,
    on_epoch: HookFunction | None = None,
    on_step_every: tuple[int, HookFunction] | None = None,
    stop_nonfinite: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int | tuple[int, str] | None = None,
    log: Logger | Sequence[Logger] | None = None,
    log_every: int = 50,
    mesh: Mesh | None = None,
    shard: placement.Rule | Mapping[str, placement.Rule] | None = None,
    evaluate_with: Callable[[TrainState], PyTree] | None = None,
    recorder: int | None = None,
) -> tuple[TrainState, History]:
    """Train for some epochs in compiled stretches of steps; return the new state and the curves.

    `train` is a tuple (x, y), such as a `data.Dataset`: it is moved to the device once, cut into batches of `batch_size` and
    shuffled anew each epoch; a last partial batch is dropped. Or it is an iterable of batches (x, y) on the host, for data
    larger than memory (a DataLoader, a list of batches): it is read again each epoch, 32 batches at a time, and takes no
    `key` and no `batch_size`. Arrays may be any that NumPy reads: tensors, frames of pandas and polars, lists of numbers.

    Data in memory go on where the state is: its epoch has the number e = state.step // (steps per epoch) and is shuffled by
    `key` (by default the state's own) folded with e. So 2 epochs, and 2 more with the state that came back, are the same
    as 4. A state in the middle of an epoch first finishes it, which counts as one of `epochs`, with a warning unless it is
    that of `step.unfinished`: for other data, where it has no meaning, pass `state.replace(step=0 * state.step)`.

    `validation` is a pair too, or batches that are joined in memory, evaluated after each epoch; or a fraction of the
    training data in memory, split off by `key` as in `data.split`, in every call alike. With `patience=k` training stops
    once the validation loss has not fallen for k epochs, and the best epoch's state is returned.

    `evaluate_with(state)` returns the parameters to validate at, instead of those that are trained: an optimiser's averages
    with `evaluate_with=fnn.optimizers.eval_params`. The state that is returned holds both.

    `progress` shows a bar with loss and validation accuracy (plain lines where the output is no terminal); by default
    only on a terminal. The state passed in stays usable.

    `scan=False` calls the compiled step once for every batch, with the same result to rounding. It is slower for small
    nets, and faster for operations that XLA runs slowly inside a loop: on a CPU the gradients of convolutions that do not
    come from `fnn.conv`, such as Flax's.

    `on_epoch(report)` is called after every epoch and its validation, `on_step_every=(k, f)` calls f(report) after every
    step whose number k divides (`state.step`). A `hooks.Report` has step, epoch, state, metrics and validation. A hook that
    returns True ends the run; it may return nothing else but False and None.

    A stretch is one call of a compiled loop: at most 128 steps of data in memory, 32 of batches from outside, and less where
    an epoch ends or a hook is due. If the parameters are not finite after a stretch, the run stops, with a
    RuntimeWarning that names the step (`History.nonfinite_step`), unless `stop_nonfinite=False`. A step that the optimizer
    skips (`optax.apply_if_finite`) leaves them finite, and does not count.

    `checkpoint=folder` saves the run there after every epoch, every n epochs (`save_every=n`) or steps
    (`save_every=(n, "steps")`), and at the end. The same call goes on from the folder, after `kill -9` too, and ends with the
    same bits as a run that was left alone: state, history and validation. `state` is then still the one from which the run
    began. A finished run returns at once; with more `epochs` it goes on, unless it is out of patience. One
    file, `checkpoint.npz`, is written by a thread of its own and replaced whole: a save that is due while the last is still
    being written is left out. Another net, loss, optimiser, dtype, key, batch size, patience or other data are refused, the
    difference named (two programs are compared only under the same versions of JAX, Optax and Flax); a folder that holds
    something else is refused too (a log too), and nothing is deleted. `fnn.load(folder, state)` reads the state alone. Hooks are called
    again for what came after the last save. Of batches from outside, an iterator with `get_state` and `set_state` (Grain's) is
    set to where it was; others are read again from the first epoch on, without training, and checked by the last batch. Of
    several processes the first writes, and all must see the folder.

    With `mesh`, as `jax.make_mesh` makes it, several devices train together: each batch is cut along the mesh's first axis,
    which must divide `batch_size`. Parameters are whole on every device, or cut by the rules `shard`, as in `fnn.shard`.
    Data in memory are whole on every device, unless they are cut over the mesh already; then every step fetches its batch
    from the others. A batch from outside that the devices do not divide is computed whole on each of them. The state comes
    back on the mesh. Every number is that of one device to rounding; with JAX's default keys dropout masks are the same.
    Of several processes (`jax.distributed`) each calls `fit` with the same arguments, except that of batches from outside
    each gives its own share: as many batches, of the same size, in every process.

    `log` is a logger, anything with `.log(dict, step=)` (a run of wandb, `fnn.log.csv(path)`), or a list of them. It gets the
    metrics of every step whose number `log_every` divides, steps being counted as `state.step` counts them, and the
    validation after every epoch; a tree is flattened to one number for each path (`fnn.log.flat`).

    `recorder=K` keeps what it takes to run the last steps again, K of them or more: `step.recording`, for `fnn.replay`. It
    holds two copies of the state, made in turn at ends of stretches at least K steps apart, and of batches from outside those
    since the older one. If the loss jumps (`fnn.replay` says how much is a jump), what is kept of the highest jump stays, a
    third copy. A run that stops on parameters that are not finite, or by an error, leaves its recording too. It begins anew
    with every call, from a checkpoint too, and is for one device: with `mesh` it is refused.

    The keywords are many because each can be left out by itself, and a call reads better with them than with an object
    of options.

    Ctrl-C, or an error in the data or a hook, loses nothing but the stretch that was not finished: the exception has two
    attributes, `state` and `history` of all finished stretches, and `step.unfinished` is the pair of them: in a notebook go
    on with `state, history = step.unfinished`. An unfinished epoch is the last of `history.steps_per_epoch`, and has no
    validation. Ctrl-C waits for the end of a stretch. Only an error inside a compiled step destroys the state that it was
    given: then `state` is the best epoch's (with patience), or the first.

    Guarantee: same key, same data, same state: same result, on one CPU bit for bit (on a GPU: see `train_step`), whatever
    hooks look on. Errors: ValueError for NaN in the data, labels out of range, a batch larger than the data, an iterator
    that cannot be read again, a state of another net or optimiser, a checkpoint of another run; TypeError for what is no data, for arguments that do
    not apply to it, and for what a hook must not return.
    """
    check.positive("fit", epochs=epochs)
    if patience is not None:
        check.positive("fit", patience=patience)
        if validation is None:
            raise ValueError("fit: patience needs validation data, got validation=None; pass a pair (x, y)")
    if not isinstance(step, TrainStep):
        raise TypeError(f"fit: step must be what train_step returns, got {type(step).__name__}")
    check_state("fit", state)
    check.alive("fit", state)
    if key is not None:
        check.prng_key("fit", key)
    hooks, loggers = collect(on_epoch, on_step_every), Loggers(log, log_every)
    if checkpoint is None and save_every is not None:
        raise TypeError(f"fit: save_every needs a folder to save in, got {save_every!r} alone; pass checkpoint=folder")
    keeper = None if checkpoint is None else Checkpoint(checkpoint, 1 if save_every is None else save_every, epochs)
    if checkpoint is not None:
        loggers.check_outside(checkpoint)
    given, (train, held) = state, prepare(step, state, train, key, batch_size, validation)
    if shard is not None and mesh is None:
        raise ValueError(
            f"fit: shard= needs mesh=, got shard={shard!r} alone; pass the mesh whose devices are to share"
        )
    if mesh is not None:
        if recorder is not None:
            raise ValueError(
                f"fit: recorder= must be left out with mesh=, got recorder={recorder!r}; train on one device"
            )
        step, state, train, held = placement.place(step, state, train, held, mesh, shard)
    if isinstance(train, Dataset):
        feed: Any = InMemory(step, state, train, key, int(batch_size or 0), scan)
    else:
        feed = FromBatches(step, train, epochs, scan, tracked=keeper is not None)
    if held is not None and evaluate_with is None:
        check_evaluated("fit", state.opt_state, "evaluate_with=fnn.optimizers.eval_params")
    unfinished, step.unfinished, step.recording = step.unfinished, None, None
    recording = None if recorder is None else Recorder(recorder, step, feed)
    run = Run(jax.tree.map(jnp.copy, state))  # the steps donate their state, and the caller's stays usable
    if keeper is not None:
        options = {"key": key_numbers(key), "batch_size": batch_size, "patience": patience, "scan": scan}
        data = {"training data": feed.checksum(), "validation data": held and checksum(held)}
        keeper.begin(run, step, feed, options | data)
        keeper.before_save = loggers.before_save
    loggers.begin(run.step, run.within)
    if recording is not None:
        recording.begin(run)
    if isinstance(feed, InMemory) and not (unfinished and unfinished[0] is given):
        feed.warn_of_middle(int(state.step))
    try:
        with Progress("epoch", epochs, progress, done=len(run.lengths) - run.within) as bar, keeper or nullcontext():
            while not run.is_done(epochs):
                _train(run, feed, hooks, keeper, loggers, stop_nonfinite, recording)
                if not run.within:
                    _validate(step, run, held, evaluate_with, patience)
                    _finish_epoch(run, held, hooks, patience, bar)
                    loggers.epoch(run, {} if held is None else run.curves[-1])
                    if keeper is not None:
                        keeper.after_epoch(run)
            if keeper is not None and (run.nonfinite_step is None or not stop_nonfinite):
                keeper.save(run, last=True)
    except BaseException as error:
        kept = run.keeps_state()
        with contextlib.suppress(Exception):
            loggers.catch_up(run)
        with contextlib.suppress(Exception):
            step.recording = recording and recording.recording(run)
        step.unfinished = placement.released(run.state if kept else run.best or state, mesh), run.history()
        n = sum(run.lengths)
        where = "after them" if kept else "before them all, or the best epoch's: the step that failed destroyed its own"
        with contextlib.suppress(Exception):  # an exception that takes no attributes
            error.state, error.history = step.unfinished  # type: ignore[attr-defined]
            error.add_note(f"fit: {n} steps were finished; state, history = step.unfinished holds the state {where}")
        raise
    finally:
        loggers.close()
    step.recording = recording and recording.recording(run)
    return placement.released(run.best or run.state, mesh), run.history()


def _train(
    run: Run,
    feed: Any,
    hooks: Sequence[Hook],
    keeper: Checkpoint | None,
    loggers: Loggers,
    stop_nonfinite: bool,
    recording: Recorder | None,
) -> None:
    """Train to the end of an epoch, or to where a hook or parameters that are not finite end the run.

    The arguments are the parts of one `fit`, hence seven.
    """
    if not run.within:
        run.lengths.append(0)
        run.within = True
    periods = [k for k in (*(hook.every for hook in hooks), keeper and keeper.steps) if k]
    for _ in feed.stretches(run, len(run.lengths) - 1, periods):
        if recording is not None:
            recording.after_stretch(run)
        due = any(run.step % k == 0 for k in periods)
        finite = run.is_finite(wait=due) or not stop_nonfinite
        loggers.catch_up(run, now=False)
        run.stopped = after_steps(hooks, run) or not finite
        if keeper is not None and finite:
            keeper.after_steps(run)
        if run.stopped:
            break
    else:
        run.stopped = not run.is_finite(wait=True) and stop_nonfinite
        run.within = run.stopped
    if stop_nonfinite and run.nonfinite_step is not None:
        _warn(run)


def _validate(step: TrainStep, run: Run, held: Any, evaluate_with: Any, patience: int | None) -> None:
    """Evaluate on held-out data, if there are any, and keep the best state."""
    if held is not None:
        params = evaluate_with(run.state) if evaluate_with else run.state.params
        scores = averages(step.net, params, run.state.net_state, held, step.measured)
        run.keep_scores(scores, with_state=patience is not None)


def _finish_epoch(run: Run, held: Any, hooks: Sequence[Hook], patience: int | None, bar: Any) -> None:
    """Show and report the epoch; say whether the run stops here."""
    scores = {} if held is None else run.curves[-1]
    shown = {"loss": float(np.mean(run.metrics(run.lengths[-1])["loss"]))}
    shown |= {f"validation {name}": value for name, value in scores.items()}
    bar.finish("  ".join(f"{name} {value:.4f}" for name, value in shown.items()), keep=False)
    run.stopped = after_epoch(hooks, run, scores) or run.is_out_of_patience(patience)


def _warn(run: Run) -> None:
    at = run.nonfinite_step or 0
    loss = run.metrics(run.step - run.first)["loss"][at - run.first]
    warnings.warn(
        f"fit: stopped because the parameters are no longer finite; the loss of step {at} is {loss:.4g}; from the state before "
        "it, fnn.watch(loss).first_bad(params, batch) names the operation, and with recorder=100 fnn.replay(step.recording) "
        "says what removes it; stop_nonfinite=False goes on",
        RuntimeWarning,
        stacklevel=4,
    )
