"""Folders as studies would write them, without running any: what the tests of the report read."""

import json
import math

import polars as pl

from fnn.study import results, table
from fnn.theory import meanfield

AXES = {"depth": "int", "activation": "str", "norm": "str", "seed": "int", "sigma_w": "float"}
DEPTHS, SEEDS = (4, 16, 400), 5


def made(folder, sigmas=(0.5, 1.3, 2.0), norms=("none", "batch_norm"), steps=(0, 40), hole=None):
    """Write a study's folder as a run would: log10_error falls by ½ log10 chi a layer, seed s lies s - 2 hundredths off."""
    (folder / "cells").mkdir(parents=True)
    cells, frames = [], []
    for norm in norms:
        for depth in DEPTHS:
            cells.append(
                {
                    "static": {"depth": depth, "activation": "tanh", "norm": norm},
                    "runs": [],
                    "steps": list(steps),
                    "chunk": 5,
                }
            )
            rows = []
            for sigma in sigmas:
                chi = meanfield.fixed_point("tanh", sigma, 0.0).chi if norm == "none" else 1.3
                for seed in range(SEEDS):
                    cells[-1]["runs"].append({"seed": seed, "sigma_w": sigma})
                    run = {
                        "cell": len(frames),
                        "depth": depth,
                        "activation": "tanh",
                        "norm": norm,
                        "seed": seed,
                        "sigma_w": sigma,
                    }
                    for step in steps:
                        for layer in range(1, depth + 2):
                            path = "2/preactivation" if layer == 1 else f"5/trunk/[{layer - 2}]/1/preactivation"
                            mean = (depth - layer) * math.log10(chi) / 2
                            value = mean + (seed - 2) / 100 + step / 10
                            if hole == (depth, sigma) and layer == 2:
                                value = -math.inf
                            known = step == 0 and layer <= depth
                            band = {"predicted": mean, "low": mean - 0.015, "high": mean + 0.015} if known else {}
                            rows.append(
                                run
                                | {"step": step, "layer": layer, "path": path, "role": "preactivation"}
                                | {"quantity": "log10_error", "value": value}
                                | band
                                | ({"outside": abs(seed - 2) > 1} if known else {})
                            )
                            kernel = {
                                "path": f"{layer}/kernel",
                                "role": "",
                                "quantity": "log10_kernel",
                                "value": value + 1,
                            }
                            rows.append(run | {"step": step, "layer": layer} | kernel)
                    whole = {"layer": 0, "path": "", "role": ""}
                    for step in range(max(steps) + 1):
                        loss = {"step": step, "quantity": "train_loss", "value": 2.3 * 0.97**step + seed / 50}
                        rows.append(run | whole | loss)
                    for step in steps:
                        hit = {"step": step, "quantity": "accuracy", "value": 0.1 + step / 50 - seed / 100}
                        rows.append(run | whole | hit)
                    end = {"step": max(steps), "quantity": "diverged", "value": float(seed == 4 and sigma == 2.0)}
                    rows.append(run | whole | end)
            frames.append(pl.DataFrame(rows, schema=table.schema(AXES)))
    axes = {"static": ["depth", "activation", "norm"], "traced": ["seed", "sigma_w"]}
    description = {"format": results.FORMAT, "axes": axes, "types": AXES, "cells": cells, "steps": list(steps)}
    (folder / "study.json").write_text(json.dumps(description))
    for number, frame in enumerate(frames):
        put(folder, number, frame)
    session = {"versions": {"jax": "1.2.3"}, "devices": "cpu </script>", "commit": "abc"}
    (folder / "sessions.json").write_text(json.dumps([session]))
    return folder


def put(folder, number, frame):
    """Write a cell as a run would."""
    key = results.key(json.loads((folder / "study.json").read_text()))
    note = {"study": key, "cell": number, "seconds": {"compile": 1.0, "run": 1.0}}
    (folder / "cells" / f"{number:05d}.parquet").write_bytes(results.pack(frame, note))
