"""The benchmarks run, check their peers before they time them, and write what they measured."""

import json
import os
import re
import sys
import time
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest

from bench import __main__ as command
from bench import accelerator, handwritten, limit, models, problem, step, timing
from bench.emitter import Part
from bench.problem import Row
from bench.remote import Remote, step_run


def test_step_suite_checks_peers_times_them_and_writes(tmp_path, capsys, monkeypatch):
    def wrong(work):
        ready = step.PEERS["jax-steps"].build(work)
        return timing.Run(ready.call, ready.state, ready.items, lambda out: ready.loss(out) + 0.01)

    def broken(work):
        raise OSError("cannot read /some/where/secret")

    for name, build, needs in (("wrong", wrong, ""), ("broken", broken, ""), ("absent", wrong, "nonesuch")):
        peer = step.PEERS["jax-steps"]._replace(build=build, needs=needs)
        monkeypatch.setitem(step.PEERS, name, peer)
        monkeypatch.setitem(step.NAMES, name, peer.about)
    peers = "fnn-fit,jax-steps,linen-scan,wrong,broken,absent"
    options = ["--rows", "8x2/16", "--peers", peers, "--quick", "--rounds", "2", "--out", str(tmp_path)]
    precision = jax.config.jax_default_matmul_precision
    try:
        command.main(options)
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    entries = {entry["name"]: entry for entry in results["rows"][0]["peers"]}
    assert {name: entry["outcome"] for name, entry in entries.items()} == {
        "fnn-fit": "timed",
        "jax-steps": "timed",
        "linen-scan": "timed",
        "wrong": "failed",
        "broken": "failed",
        "absent": "skipped",
    }
    assert min(entry["ratio"]["median"] for entry in entries.values() if entry["ratio"]) == 1
    assert len(entries["fnn-fit"]["times"]["rounds_ms"]) == 2
    assert "losses" in entries["wrong"]["reason"] and "secret" not in entries["broken"]["reason"]
    text = next(tmp_path.glob("*.md")).read_text()
    assert re.search(r"\| fnn-fit \| [\d.]+ \|", text) and "nonesuch is not installed" in text
    assert str(tmp_path) not in text and str(tmp_path) not in path.read_text()


def test_flops_are_those_of_the_products_and_floors_divide_by_the_limits():
    row = Row(3, 2, 5)
    forward = 5 * (64 * 3 + 3 * 3 + 3 * 10)
    data = 5 * 64 * 3
    assert limit.step_flops(row) == 2 * (3 * forward - data)
    floor = limit.floor(row, limit.Limits(flops=1e6, bandwidth=1e6, product=1))
    assert floor.matmul == pytest.approx(limit.step_flops(row) / 1e3)


def test_handwritten_step_equals_fnn_in_float64():
    """The reference of all peers: three steps of the hand-written net against fnn's own, in float64."""
    work = problem.make(Row(8, 2, 16), 3)
    reference = handwritten.reference_losses(work)
    ready = step.PEERS["fnn-stretch"].build(work)
    np.testing.assert_allclose(ready.first_round()[1], reference, rtol=1e-5)


@pytest.mark.parametrize("name", ["fnn-stretch", "jax-unrolled", "linen", "nnx", "equinox"])
def test_bfloat16_rows_round_and_agree(name):
    """Losses lie near those in float64, but not on them: what is to be timed computes in bfloat16."""
    work = problem.make(Row(8, 2, 64, "bfloat16"), 3)
    losses, reference = step.PEERS[name].build(work).first_round()[1], handwritten.reference_losses(work)
    off = np.abs(losses - reference)
    assert off.max() < 1e-2 and off.max() > 1e-5


def test_models_are_chosen_by_name_and_wrong_losses_are_reported_not_raised(tmp_path, capsys, monkeypatch):
    def broken(name, model):
        raise MemoryError("no room")

    def wrong(name, model):
        ready = models.BUILDERS["jax"](name, model)
        return timing.Run(ready.call, ready.state, ready.items, lambda out: ready.loss(out) * 1.1)

    monkeypatch.setitem(models.BUILDERS, "nnx", broken)
    monkeypatch.setitem(models.BUILDERS, "equinox", wrong)
    peers = "fnn-loop,jax,linen,nnx,equinox"
    arguments = ["--suite", "models", "--rows", "transformer-100m", "--quick", "--rounds", "1", "--peers", peers]
    options = command.parse(arguments)
    assert options.rows == ["transformer-100m"]
    (section,) = models.run(options, lambda text: None)
    outcomes = {entry["name"]: entry["outcome"] for entry in section.data["peers"]}
    assert outcomes == {"fnn-loop": "timed", "jax": "timed", "linen": "timed", "nnx": "failed", "equinox": "failed"}
    assert np.ptp([section.data["losses"][name] for name in ("fnn-loop", "jax", "linen")], axis=0).max() < 1e-2


def test_the_large_transformer_has_110_million_parameters():
    model, width = models.MODELS["transformer-100m"], 768
    params, _ = jax.eval_shape(model.net().init, jax.random.key(0), model.specs())
    block = 12 * width**2 + (3 + 1 + 4 + 1) * width + 2 * 2 * width  # kernels, biases, two norms
    tables = (32_768 + 512) * width
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == tables + 12 * block + 2 * width


def test_a_peer_in_another_process_trains_as_here_and_one_that_raises_there_raises_here():
    row = Row(8, 2, 16)
    other, broken = Remote(step_run, "jax-steps", row, 3), Remote(step_run, "nonesuch", row, 3)
    with pytest.raises(RuntimeError, match="KeyError: 'nonesuch'"):
        broken.first_round()
    here = step.PEERS["jax-steps"].build(problem.make(row, 3))
    np.testing.assert_allclose(other.first_round()[1], here.first_round()[1], rtol=1e-6)
    assert other.advance(other.items)[0] > 0 and len(other.items) == 1
    here.advance(here.items)
    np.testing.assert_allclose(other.last_losses(), here.last_losses(), rtol=1e-5)
    other.close()
    with pytest.raises(RuntimeError):  # it is forgotten there
        other.last_losses()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--suite sweep --peers linen", "suite sweep has no linen"),
        ("--rows 64x4", "must be one of"),
        ("--suite models --rows conv,mlp", "'mlp': must be one of convnet, resnet"),
        ("--suite depth --trace x", "goes with the suite step"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        command.parse(arguments.split())
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


PART = """
import json, subprocess, sys, time
name, folder = sys.argv[2], sys.argv[4]
section = {"title": "times", "columns": ["what", "ms"], "cells": [[name, "1"]], "notes": [], "data": {"ms": 1}}
if name == "broken":
    sys.exit("cannot read /some/where/secret")
result = {"environment": {"device": "a board", "platform": "board"}, "headline": "fast", "error": "", "sections": [section]}
if name == "slow":
    below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    section["data"]["below"] = below.pid
open(f"{folder}/{name}.json", "w").write(json.dumps(result))
time.sleep(60 if name == "slow" else 0)
"""


def test_a_part_over_its_limit_is_ended_and_the_others_stand(tmp_path, capsys):
    script, out = tmp_path / "part.py", tmp_path / "out"
    script.write_text(PART)
    limits = {"slow": 1, "good": 4, "broken": 4, "long": 600}
    parts = {name: Part(name, seconds, lambda options, emit: None) for name, seconds in limits.items()}
    options = Namespace(seconds=8, out=out, quick=False, commit="abc")
    outcomes = accelerator.run(parts, [sys.executable, str(script)], options)
    assert [o.outcome for o in outcomes] == ["stopped", "done", "failed", "not run"]
    assert 1 <= outcomes[0].seconds < 3
    assert "over its limit of 1 s" in outcomes[0].error and "exit status 1" in outcomes[2].error
    below = outcomes[0].sections[0].data["below"]
    for _ in range(100):  # the kernel takes a moment
        if not _alive(below):
            break
        time.sleep(0.01)
    assert not _alive(below)
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".md"]
    (text,) = (path.read_text() for path in out.glob("accelerator-board-*.md"))
    for said in ("| slow | 1 |", "| good | 1 |", "a board", "commit: abc", "long: not run", "cannot read ..."):
        assert said in text, said
    data = json.loads(next(out.glob("*.json")).read_text())
    assert [row.get("part") for row in data["rows"]] == [None, "slow", "good"]
    assert "secret" not in json.dumps(data) + text + capsys.readouterr().out


def _alive(pid):
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # a zombie has ended
    except OSError:
        return False


def test_a_part_keeps_its_tables_when_it_fails(tmp_path, monkeypatch, capsys):
    def fail(options, emit):
        emit(accelerator.Section("a", ("b",), [("c",)], []))
        raise OSError("cannot read /some/where/secret")

    monkeypatch.setitem(accelerator.PARTS, "facts", Part("fails", 1, fail))
    assert accelerator.main(["--part", "facts", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "facts.json").read_text())
    assert result["sections"][0]["title"] == "a"
    assert "OSError: cannot read ..." in result["error"] and "secret" not in result["error"]


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--accelerator", "--parts", "facts,nonesuch"])
    assert stop.value.code == 2 and "there is no part nonesuch; there are facts, rates" in capsys.readouterr().err
