"""The suite `scale`: one step's batch over several devices, and over two processes, simulated on this machine."""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import fnn
from bench import problem
from bench.problem import Row
from bench.report import Section

ABOUT = """\
The train step of the suite `step` with its batch sharded over 1, 2, 4 and 8 devices and its parameters on all of them
(`jax.sharding`), and over two processes joined by `jax.distributed`. The devices are simulated: they share this
machine's cores, so that the times say what the partition costs, not what it gains. Losses of the first steps are
compared with those of one device; `work` is XLA's own count for one device's program."""

COLUMNS = (
    "devices",
    "processes",
    "loss, step 1",
    "loss, step 5",
    "largest difference",
    "GFLOP a device",
    "all-reduces",
    "ms/step",
)
NAMES = {"fnn": "fnn.train_step with sharded batches"}
ROW, STEPS = Row(256, 8, 256), 5


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Start one set of processes for each count of devices; yield the table once all are done."""
    row = options.rows[0] if options.rows else ROW
    records = []
    for devices, processes in ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2)):
        say(f"  {devices} devices in {processes} processes")
        records.append(_start(row, devices, processes))
    cells = []
    for record in records:
        off = max(abs(a - b) for a, b in zip(record["losses"], records[0]["losses"], strict=True))
        record["difference"] = off
        cells.append(
            (
                str(record["devices"]),
                str(record["processes"]),
                f"{record['losses'][0]:.6f}",
                f"{record['losses'][-1]:.6f}",
                f"{off:.1e}",
                f"{record['flops'] / 1e9:.4g}",
                str(record["all_reduces"]),
                f"{record['ms']:.2f}",
            )
        )
    notes = ["simulated devices on one machine's cores: times are no speed-ups"]
    yield Section(f"{row}, batch {row.batch}", COLUMNS, cells, notes, {"row": str(row), "runs": records})


def _start(row: Row, devices: int, processes: int) -> dict[str, Any]:
    """Run this file in fresh processes, since the number of devices is fixed once JAX has started."""
    port = _free_port()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices // processes}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    job = {"row": list(row), "devices": devices, "processes": processes, "port": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.scale", json.dumps(job | {"process": i})],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    results = [child.communicate(timeout=540) for child in children]
    for child, (_, errors) in zip(children, results, strict=True):
        if child.returncode:
            raise RuntimeError(f"scale: a worker with {devices} devices failed: {errors.strip().splitlines()[-1:]}")
    return json.loads(results[0][0].strip().splitlines()[-1])


def _work(job: dict[str, Any]) -> dict[str, Any]:
    """Do a worker's part: five steps from the common weights, then some more against the clock."""
    import time

    from jax.sharding import NamedSharding, PartitionSpec

    if job["processes"] > 1:
        address = f"127.0.0.1:{job['port']}"
        jax.distributed.initialize(address, num_processes=job["processes"], process_id=job["process"])
    row = Row(*job["row"])
    assert len(jax.devices()) == job["devices"]
    mesh = jax.make_mesh((job["devices"],), ("batch",))
    everywhere, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    work = problem.make(row, STEPS, unroll=1)
    net, optimizer, state = problem.fnn_start(row, unroll=1)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))
    state = jax.tree.map(lambda a: _place(a, everywhere), state)
    batches = [tuple(_place(a, cut) for a in batch) for batch in work.batches]
    compiled = step.lower(state, batches[0]).compile()
    losses = []
    for batch in batches:
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for batch in batches:
            state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / STEPS * 1e3)
    text = compiled.as_text()
    return {name: job[name] for name in ("devices", "processes")} | {
        "losses": losses,
        "flops": compiled.cost_analysis()["flops"],
        "all_reduces": text.count(" all-reduce(") + text.count(" all-reduce-start("),
        "ms": float(np.median(times)),
    }


def _place(a: Any, sharding: Any) -> jax.Array:
    """Lay an array that every process holds whole onto the devices; keys travel as their data."""
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(a), sharding), impl=jax.random.key_impl(a))
    whole = np.asarray(a)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.argv[1]))))
