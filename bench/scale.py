"""The suite `scale`: one step's batch over several devices, and over two processes, simulated on this machine."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import fnn
from bench import problem
from bench.problem import Row
from bench.report import Section

ABOUT = """\
`fnn.fit(..., mesh=)` on the net of the suite `step`, with its batch cut over 1, 2, 4 and 8 devices and its parameters whole
on all of them, or cut too (`shard="largest"`); and over two processes joined by `jax.distributed`. The devices are
simulated: they share this machine's cores, so that the times say what the partition costs, not what it gains. Losses of the
first steps are compared with those of one device. `GFLOP` and `state` are XLA's own counts for one device's program."""

COLUMNS = (
    "devices",
    "processes",
    "parameters",
    "loss, step 1",
    "loss, step 5",
    "largest difference",
    "GFLOP a device",
    "state, MB a device",
    "collectives",
    "ms/step",
)
NAMES = {"fnn": "fnn.fit on a mesh"}
ROWS, STEPS = (Row(256, 8, 256), Row(1024, 4, 512)), 5
RUNS = ((1, 1, "whole"), (2, 1, "whole"), (4, 1, "whole"), (8, 1, "whole"), (8, 1, "largest"), (2, 2, "whole"))


def run(options: Namespace, say: Callable[[str], None]) -> Iterator[Section]:
    """Start one set of processes for each count of devices; yield a row's table once all are done."""
    for row in options.rows or ROWS:
        records = []
        for devices, processes, cut in RUNS:
            say(f"  {row}: {devices} devices in {processes} processes, parameters {cut}")
            records.append(_start(row, devices, processes, cut, 1 if options.quick else 5))
        cells = []
        for record in records:
            record["difference"] = max(abs(a - b) for a, b in zip(record["losses"], records[0]["losses"], strict=True))
            cells.append(
                (
                    str(record["devices"]),
                    str(record["processes"]),
                    record["cut"],
                    f"{record['losses'][0]:.6f}",
                    f"{record['losses'][-1]:.6f}",
                    f"{record['difference']:.1e}",
                    f"{record['flops'] / 1e9:.4g}",
                    f"{record['state_bytes'] / 1e6:.3g}",
                    ", ".join(f"{count} {kind}" for kind, count in record["collectives"].items()),
                    f"{record['ms']:.2f}",
                )
            )
        notes = ["simulated devices share one machine's cores: times show what is added, and are no speed-ups"]
        yield Section(f"{row}, batch {row.batch}", COLUMNS, cells, notes, {"row": str(row), "runs": records})


def _start(row: Row, devices: int, processes: int, cut: str, rounds: int) -> dict[str, Any]:
    """Run this file in fresh processes, since the number of devices is fixed once JAX has started."""
    port = _free_port()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices // processes}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    job = {"row": list(row), "devices": devices, "processes": processes, "cut": cut, "rounds": rounds, "port": port}
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
    """Do a worker's part: five steps from the common weights, and again against the clock."""
    if job["processes"] > 1:
        address = f"127.0.0.1:{job['port']}"
        jax.distributed.initialize(address, num_processes=job["processes"], process_id=job["process"])
    row = Row(*job["row"])
    assert len(jax.devices()) == job["devices"]
    mesh = jax.make_mesh((job["devices"],), ("data",))
    work = problem.make(row, STEPS, unroll=1)
    data = tuple(np.concatenate(np.asarray(part)) for part in (work.xs, work.ys))
    net, optimizer, state = problem.fnn_start(row, unroll=1)
    step = fnn.train_step(net, fnn.losses.cross_entropy, optimizer, metrics=("loss",))
    options = {"batch_size": row.batch, "key": jax.random.key(0), "progress": False, "mesh": mesh}
    options |= {"shard": "largest"} if job["cut"] == "largest" else {}
    losses = fnn.fit(step, state, data, epochs=1, **options)[1].train["loss"]
    times = []
    for _ in range(job["rounds"]):
        start = time.perf_counter()
        fnn.fit(step, state, data, epochs=4, **options)
        times.append((time.perf_counter() - start) / (4 * STEPS) * 1e3)
    compiled = _program(step, state, row, mesh, options.get("shard"))
    names = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", compiled.as_text())) for name in names}
    return {name: job[name] for name in ("devices", "processes", "cut")} | {
        "losses": [float(loss) for loss in losses],
        "flops": compiled.cost_analysis()["flops"],
        "state_bytes": compiled.memory_analysis().alias_size_in_bytes,
        "collectives": {name: count for name, count in counts.items() if count},
        "ms": float(np.median(times)),
    }


def _program(step: Any, state: Any, row: Row, mesh: Any, rules: Any) -> Any:
    """Compile one step by itself, with its batch cut."""
    placed = fnn.shard(state, mesh, rules)
    cut = NamedSharding(mesh, PartitionSpec("data"))
    shapes = ((row.batch, problem.FEATURES), jnp.float32), ((row.batch,), jnp.int32)
    return step.lower(placed, tuple(jax.ShapeDtypeStruct(*s, sharding=cut) for s in shapes)).compile()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.argv[1]))))
