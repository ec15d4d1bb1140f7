"""The command line: what a newcomer types, and one sentence with exit code 2 for what goes wrong."""

import re

import numpy as np
import polars as pl
import pytest

from fnn import cli, study


def test_study_measures_writes_and_draws(tmp_path, capsys):
    arguments = "study --depth 2,4 --activation tanh,relu --norm none,batch_norm --width 32 --seeds 3 --out"
    assert cli.main([*arguments.split(), str(tmp_path / "new" / "folder")]) == 0
    shown = capsys.readouterr()
    assert "cell 8/8: relu, batch_norm, depth 4" in shown.err and "slope" in shown.out
    table = pl.read_parquet(tmp_path / "new" / "folder" / "study.parquet")
    assert (tmp_path / "new" / "folder" / "study.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir() if p.name.startswith(".")] == []
    errors = table.filter((pl.col("quantity") == "log_error") & pl.col("path").str.ends_with("preactivation"))
    # 2 activations x 2 norms x 3 seeds x (2+2 and 4+2 kernels)
    assert errors.height == 2 * 2 * 3 * (4 + 6)
    assert errors["value"].is_finite().all()
    hidden = errors.filter(pl.col("layer") <= pl.col("depth") + 1)
    assert hidden["predicted"].is_finite().all()
    # At init, width 32, a few layers: measured and predicted slopes agree within 0.15 without norm.
    summary = study.summarize(table).filter(pl.col("norm") == "none")
    np.testing.assert_allclose(summary["slope"], summary["predicted_slope"], atol=0.15)


def test_train_prints_the_test_accuracy(capsys, tmp_path):
    plot = tmp_path / "curves.png"
    arguments = [
        "train",
        "--data",
        "clusters",
        "--depth",
        "1",
        "--width",
        "16",
        "--epochs",
        "8",
        "--seeds",
        "2",
        "--flow",
    ]
    assert cli.main([*arguments, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    accuracy = float(re.search(r"mean of 2 seeds: test accuracy ([0-9.]+)", out).group(1))
    # Centres 4 apart, spread 1: the best possible error of neighbours is Q(2) = 2.3 % a side.
    assert accuracy > 0.9
    assert "of the steps were clipped" in out and "log_error" in out and plot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("--model convnet --width 4 --depth 1", "test accuracy"),
        ("--model resnet --width 2 --depth 1 --norm none", "test accuracy"),
        ("--model rnn --width 8 --cell gru", "test accuracy"),
        ("--model rnn --width 4 --data adding --batch-size 512", "test mean squared error"),
        ("--model transformer --width 8 --depth 1 --heads 2 --data number_words --batch-size 512", "decoded greedily"),
    ],
)
def test_train_takes_every_model(arguments, shown, capsys):
    assert cli.main(["train", *arguments.split(), "--epochs", "1"]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("study --depth 0", "depth must be a positive integer, got 0"),
        ("study --depth four", "depth must be integers separated by commas, got 'four'"),
        ("study --activation tahn", "unknown activation 'tahn'; did you mean 'tanh'?"),
        ("study --norm batchnorm", "did you mean 'batch_norm'?"),
        ("study --depth ,", "depths must name at least one value"),
        ("study --width -4", "width must be a positive integer, got -4"),
        ("study --batch-size 100000", "batch_size must be at most the 1438 training examples"),
        ("study --depth 2 --activation tanh --norm none --seeds 1 --width 4 --out /dev/null/x", "cannot write"),
        ("train --data digit", "did you mean 'digits'?"),
        ("train --data no/such/folder", "no/such/folder"),
        ("train --depth -1", "depth must be a positive integer, got -1"),
        ("train --dropout 1.5", "dropout must lie in [0, 1), got 1.5"),
        ("train --batch-size 5000", "at most the"),
        ("train --init he_norml", "did you mean 'he_normal'?"),
        ("train --model convnt", "did you mean 'convnet'?"),
        ("train --model convnet --data spirals", "needs images float[n, *positions, c], got float32[800,2]"),
        ("train --model transformer --heads 5", "heads must divide the width"),
        (
            "train --data number_words",
            "needs labelled classes, numbers, or token sequences, got targets int32[16000,13]",
        ),
        ("train --model transformer --norm none", "blocks need a norm"),
        ("train --learning-rate -1", "learning_rate must be a finite number above 0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert cli.main(arguments.split()) == 2
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert sentence in last and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["study", "--help"]])
def test_help_explains(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "gradient" in text or "test accuracy" in text


def test_unknown_option_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "--dpeth", "3"])
    assert stop.value.code == 2
