"""The benchmarks run, check their peers before they time them, and write what they measured."""

import json
import re

import jax
import numpy as np
import pytest

from bench import __main__ as command
from bench import handwritten, limit, models, problem, step, timing, watch, watching
from bench.problem import Row
from bench.remote import Remote, step_run


@pytest.fixture(autouse=True)
def caches(monkeypatch):
    """Let the suites, which clear JAX's caches to measure memory, leave here what other tests have traced."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


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
    peers = "fnn-fit,jax-steps,wrong,broken,absent"
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


@pytest.mark.slow  # the step suite checks its peers too, and test_watch the readings
def test_watch_suite_checks_the_readings_of_other_libraries_and_times_them(tmp_path, monkeypatch, capsys):
    def wrong(p):
        plain, watched = watching.by_hand(p)

        def doubled(params, batch):
            out, readings = watched(params, batch)
            return out, readings._replace(error=2 * readings.error)

        return plain, doubled

    monkeypatch.setitem(watching.JAX_PEERS, "jax", wrong)
    options = command.parse(["--suite", "watch", "--quick", "--rounds", "2", "--peers", "mlp,jax,nnx,equinox"])
    options.variants = watch.FIRST
    mlp, others = watch.run(options, lambda text: None)
    assert [variant["name"] for variant in mlp.data["variants"]] == list(watch.FIRST)
    memory = {variant["name"]: variant["memory_mb"] for variant in mlp.data["variants"]}
    assert memory[watch.BETWEEN] == memory[watch.PLAIN] < memory[watch.SET]
    timed = {variant["name"] for variant in others.data["variants"]}
    assert timed == {f"{n}, {what}" for n in ("nnx", "equinox") for what in (watch.PLAIN, "readings")} | {
        f"fnn, {what}" for what in (watch.PLAIN, watch.SET)
    }
    assert len(others.notes) == 1 and others.notes[0].startswith("jax: skipped, AssertionError")


def test_saving_suite_ends_all_ways_with_the_same_losses(tmp_path, capsys):
    precision = jax.config.jax_default_matmul_precision
    try:
        command.main(["--suite", "saving", "--rows", "8x2/16", "--quick", "--rounds", "1", "--out", str(tmp_path)])
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    (path,) = tmp_path.glob("*.json")
    taken = json.loads(path.read_text())["rows"][0]["ms"]
    assert list(taken) == ["alone", "checkpoint", "log", "checkpoint and log"]
    assert all(len(columns) == 3 and columns[0][0] > 0 for columns in taken.values())
    assert "warning" not in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.slow  # test_curvature, test_eigenvalues and test_jacobian compare with stored matrices
def test_spectra_suite_agrees_with_stored_jacobians_and_writes(tmp_path, capsys):
    precision = jax.config.jax_default_matmul_precision
    try:
        options = ["--rows", "8x2/16", "--quick", "--rounds", "1", "--peers", "fnn,stacked", "--out", str(tmp_path)]
        command.main(["--suite", "spectra", *options])
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    curvature, kernel = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    searches = {f"{name}{way}" for name in ("cold", "cold, moved", "warm") for way in ("", ", residuals")}
    assert set(curvature["ms"]) == {"gradient", "one product", "of ten", *searches}
    # Not always fewer: a step of training may turn the eigenvector of a net as small as this one.
    assert 3 <= int(curvature["products"]["warm"]) <= 2 * int(curvature["products"]["cold"])
    assert kernel["MB"]["fnn"] < kernel["MB"]["stacked"]
    text = next(tmp_path.glob("*.md")).read_text()
    assert "warning" not in text and "of the largest number" in text


def test_linen_measures_what_fnn_measures():
    work = problem.make(Row(8, 3, 16), 3)
    ours, theirs = (step.PEERS[name].build(work) for name in ("fnn-loop-metrics", "linen-metrics"))
    for a, b in zip(ours.advance(ours.items)[1], theirs.advance(theirs.items)[1], strict=True):
        assert a.keys() == b.keys() and len(a) == 7
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-6, err_msg=name)
