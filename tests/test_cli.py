"""The command line: what a newcomer types, and one sentence with exit code 2 for what goes wrong."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest

import fnn
from fnn.cli import diagnose, main, networks_table, recipes, study, terminal, train
from fnn.study import results
from fnn.study.summary import Summary, summarize


def test_study_measures_trains_writes_draws_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = (
        "study --depth 3 --activation relu --norm none --width 32 --seeds 3 --sigma-w 1.0:1.5:2 --learning-rate 0.01 "
    )
    command += " --epochs 1"
    assert main.main([*command.split(), "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert (
        "1 cell, 6 runs, recorded at step 0, 44" in shown.err
        and "cell 0/1: 1 compiling" in shown.err
        and "cell 1/1: depth 3" in shown.err
    )
    assert (
        "compiled in" in shown.err
        and "all done" in shown.err
        and "growth" in shown.out
        and "table = fnn.results.read('studies/" in shown.out
    )
    folder = (tmp_path / "studies" / "latest").resolve()
    assert folder.parent == tmp_path / "studies" and list((tmp_path / "cache" / "fnn" / "xla").iterdir())
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    again = shlex.split((folder / "command.txt").read_text())
    assert main._options(main.COMMANDS["study"][0]).keys() >= {word[2:] for word in again if word.startswith("--")}
    assert again[:4] == ["fnn", "study", "--depth", "3"] and "--workers" not in again
    table = results.read("studies/latest").table()
    errors = table.filter((pl.col("quantity") == "log10_error") & (pl.col("role") == "preactivation"))
    # 2 sigmas x 3 seeds x 2 steps x (3 hidden kernels and the output's)
    assert errors.height == 2 * 3 * 2 * 4
    assert errors["value"].is_finite().all()
    hidden = errors.filter((pl.col("layer") <= pl.col("depth")) & (pl.col("step") == 0))
    assert hidden["predicted"].is_finite().all()
    # At init, width 32, a few layers, medians of measured and predicted rates of the square agree within 0.3.
    networks = summarize(table).networks
    np.testing.assert_allclose(networks["log10_growth"], networks["log10_growth_predicted"], atol=0.065)
    accuracy = table.filter((pl.col("quantity") == "accuracy") & (pl.col("step") == 44))["value"]
    assert accuracy.len() == 6 and accuracy.median() > 0.5  # an epoch of Adam; ten classes
    assert main.main(again[1:]) == 0  # the remembered command, defaults written out, asks for the same study
    assert "1 of 1 cell is there already" in capsys.readouterr().err


def test_a_study_from_a_toml_file(tmp_path, capsys):
    path = tmp_path / "study.toml"
    path.write_text('seeds = 2\nsteps = 0\ndata = "clusters"\n[[grid]]\ndepth = "1:2:2"\nwidth = 8\nbatch_size = 8\n')
    assert (
        main.main(["study", "--file", str(path), "--seeds", "3", "--quantities", "log10_error", "--out", str(tmp_path)])
        == 0
    )
    said = capsys.readouterr().err
    assert "2 cells, 6 runs, recorded at step 0;" in said and "cell 2/2: depth 2" in said
    assert results.read(tmp_path).table()["quantity"].unique().to_list() == ["log10_error"]
    path.write_text("sedes = 2\n[[grid]]\ndepth = 1\n")
    assert main.main(["study", "--file", str(path)]) == 2
    assert "did you mean 'seeds'?" in capsys.readouterr().err
    assert main.main(["study", "--file", str(path), "--depth", "3"]) == 2
    assert "write it there" in capsys.readouterr().err


def test_an_option_with_the_value_of_its_default_is_given_too(tmp_path, monkeypatch):
    path, asked = tmp_path / "study.toml", []
    path.write_text('seeds = 2\nsteps = 5\nchunk = 3\ndata = "clusters"\n[[grid]]\ndepth = 1\n')
    monkeypatch.setitem(main.COMMANDS, "study", (study.Study, lambda options: asked.append(options) or 0))
    for words in ([], ["--seeds=8", "--data", "digits", "--chunk", "0", "--epochs", "0"]):
        assert main.main(["study", "--file", str(path), *words]) == 0
    found = [study._described(options) for options in asked]
    assert [(s.seeds, s.data, s.chunk, s.steps, s.epochs) for s in found] == [
        (2, "clusters", 3, 5, 3),
        (8, "digits", None, None, 0),
    ]
    assert asked[1].command().startswith("fnn study --seeds 8 --epochs 0 --data digits")
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        assert (
            asked[1].command().startswith("JAX_ENABLE_X64=1 JAX_DEFAULT_MATMUL_PRECISION=highest fnn study --seeds 8")
        )
    asked.clear()
    assert main.main(["study", "--file", str(path), "--depth", "4,16,64,128,256"]) == 0
    with pytest.raises(ValueError, match="got --depth too; write it there"):
        study._described(asked[0])


def test_a_script_whose_parameters_can_be_called(tmp_path, monkeypatch):
    """As those of Equinox can: they are no loss of outputs and targets."""
    path, asked = tmp_path / "one.py", []
    path.write_text(
        "import jax, jax.numpy as jnp, optax\n"
        "class Model(dict):\n    __call__ = len\n"
        "jax.tree_util.register_pytree_node(Model, lambda m: (tuple(m.values()), tuple(m)), lambda k, v: Model(zip(k, v)))\n"
        "def make():\n    return (lambda p, b: 0.0), Model(w=jnp.ones(2)), [], optax.sgd(1.0)\n"
        "def plain():\n    return (lambda: 0), (lambda o, y: 0.0), optax.sgd(1.0), ()\n"
    )
    for name in ("diagnose", "diagnose_loss"):
        monkeypatch.setattr(f"fnn.diagnosis.diagnose.{name}", lambda *args, name=name, **more: asked.append(name))
    monkeypatch.setattr(diagnose, "_told", lambda found, html: 0)
    for function in ("make", "plain"):
        assert main.main(["diagnose", f"{path}:{function}"]) == 0
    assert asked == ["diagnose_loss", "diagnose"]


def test_the_command_that_diagnoses_a_training_can_be_typed():
    model = recipes.Mlp(residual=True)
    line = diagnose.command(model, train.Train(model, epochs=1)).split()
    main._check_options("fnn diagnose", {"mlp": diagnose.Diagnose[recipes.Mlp]}, line[2:])
    assert line == ["fnn", "diagnose", "mlp", "--residual", "--epochs", "1"]


def test_the_printed_table_fits_and_has_the_pages_numbers(capsys, monkeypatch):
    """At 80 columns whole columns go, the least important first, and are named; no number is cut or rounded otherwise."""
    row = {
        "network": 0,
        "depth": 64,
        "seeds": 8,
        "diverged": 3,
        "accuracy": 0.5,
        "outside": 0.25,
        "log10_growth": -0.0217,
        "log10_first": -3.9,
    }
    row |= {"log10_last": 0.0, "log10_growth_low": -0.0434, "log10_growth_high": 0.0, "log10_growth_predicted": -0.01}
    networks = pl.DataFrame(
        [row, row | {"network": 1, "depth": 128, "log10_growth": None, "log10_growth_predicted": None}]
    )
    s = Summary(["depth"], {"norm": "none"}, networks, *[pl.DataFrame()] * 4)
    for width, there, gone in (
        (140, ["band", "3 of 8", "-0.0434 +0.0000"], []),
        (60, ["-0.0217", "vanishes"], ["at layer 1"]),
    ):
        monkeypatch.setattr(terminal, "WIDTH", width)
        networks_table.print_networks(s, 0.1, True)
        shown = capsys.readouterr().out
        table = [line for line in shown.splitlines() if line[:1] in "┏┃│└"]
        assert max(map(len, table)) <= width and "…" not in shown
        assert all(word in " ".join(shown.split()) for word in there)
        assert all(word in shown.partition("not shown, for lack of width: ")[2] for word in gone)


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
    assert main.main([*arguments, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    accuracy = float(re.search(r"mean of 2 seeds: test accuracy ([0-9.]+)", out).group(1))
    # Centres 4 apart, spread 1: the best possible error of neighbours is Q(2) = 2.3 % a side.
    assert accuracy > 0.9
    assert "of the steps were clipped" in out and "log10_error" in out and plot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("convnet --width 4 --convs 1", "test accuracy"),
        ("resnet --width 2 --blocks 1 --norm none", "test accuracy"),
        ("rnn --width 8 --cell gru", "test accuracy"),
        ("rnn --width 4 --data adding --batch-size 512", "test mean squared error"),
        ("transformer --width 8 --depth 1 --heads 2 --data number_words --batch-size 512", "greedy decoding"),
        (
            "transformer --width 8 --depth 1 --heads 2 --data number_words --encoder 1 --batch-size 2048",
            "greedy decoding",
        ),
    ],
)
def test_train_takes_every_model(arguments, shown, capsys):
    assert main.main(["train", *arguments.split(), "--epochs", "1"]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("study --depth 0", "depth must be a positive integer, got 0"),
        ("study --depth four", "depth must be a positive integer, got 'four'"),
        ("study --depth 1:2", "low:high:count"),
        ("study --depth 1,2.5", "depth must be a positive integer, got 2.5"),
        ("study --activation tahn", "unknown activation 'tahn'; did you mean 'tanh'?"),
        ("study --norm batchnorm", "did you mean 'batch_norm'?"),
        ("study --depth ,", "depth must name at least one value"),
        ("study --width -4", "width must be a positive integer, got -4"),
        ("study --quantities log10_eror", "unknown quantity 'log10_eror'; did you mean 'log10_error'?"),
        ("study --zip depth,widht", "got widht"),
        ("study --epochs 3 --steps 0,10", "epochs or steps say what is recorded, got epochs 3 and steps [0, 10]"),
        ("study --data no/such/folder", "no/such/folder"),
        ("study --file no/such/file", "no/such/file"),
        ("compare no/such other", "must hold a study"),
        ("study --batch-size 100000", "batch_size must be at most the 1438 training examples"),
        ("study --depth 2 --activation tanh --norm none --seeds 1 --width 4 --out /dev/null/x", "cannot write"),
        ("train --data digit", "did you mean 'digits'?"),
        ("train --data no/such/folder", "no/such/folder"),
        ("train --depth -1", "depth must be a positive integer, got -1"),
        ("train --dropout 1.5", "dropout must lie in [0, 1), got 1.5"),
        ("train --batch-size 5000", "at most the"),
        ("train --init he_norml", "did you mean 'he_normal'?"),
        ("train convnt", "train: unknown model 'convnt'; did you mean 'convnet'?"),
        ("train --seeds 5 --model convnet", "the model comes first, without --model; write fnn train convnet"),
        ("train convnet --data spirals", "needs images float[n, *positions, c], got float32[800,2]"),
        ("train transformer --heads 5", "heads must divide the width"),
        (
            "train --data number_words",
            "needs labelled classes, numbers, or token sequences, got targets int32[16000,13]",
        ),
        ("train transformer --data adding --encoder 1", "an encoder needs the data number_words, got 'adding'"),
        ("train transformer --data number_words --encoder -1", "encoder must be an integer of at least 0, got -1"),
        ("train transformer --norm none", "encoder: blocks need a norm"),
        ("train --learning-rate -1", "learning_rate must be a finite number above 0"),
        ("train --plot /no/such/folder/x.png", "the folder of --plot must exist, got '/no/such/folder/x.png'"),
        ("train --plot x.foo", "a figure must be one of"),
        ("train --plot /tmp", "--plot must name a file that can be written, got '/tmp'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert main.main(arguments.split()) == 2
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert sentence in last and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "shown", "absent"),
    [
        ("--help", ["train", "study", "compare", "report", "--version"], ["1e-4:1e-1:4:log", "Parquet"]),
        ("train --help", ["mlp", "transformer", "fnn train --depth 50"], ["--heads"]),
        (
            "train transformer --help",
            ["--heads", "--encoder", "--batch-size", "number of blocks"],
            ["--cell", "--init"],
        ),
        ("train mlp --help", ["number of hidden layers", "(default: 3)", "--plot"], ["--heads", "--model"]),
        (
            "study --help",
            ["network options", "training options", "run options", "gelu_tanh", "none, batch_norm", "lamb"],
            ["softmax"],
        ),
        ("study --check --help", ["--check", "check.parquet"], []),
        ("compare --help", ["spread over seeds", "compare [-h] A B"], ["STR"]),
        ("diagnose --help", ["uses an mlp", "script.py:make", "3: no cause was found"], ["--target"]),
        ("diagnose script.py:make --help", ["Exit code 0: healthy", "arguments of `fnn.diagnose`"], ["--target"]),
        ("report --help", ["no internet connection"], []),
    ],
)
def test_help_shows_what_a_command_has(arguments, shown, absent, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(arguments.split())
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert [word for word in shown if word not in text] == [] == [word for word in absent if word in text]


def test_version(capsys):
    assert main.main(["--version"]) == 0 and capsys.readouterr().out == f"fnn {fnn.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("study --dpeth 3", "study: unknown option --dpeth; did you mean --depth?"),
        ("train --lr 1e-3", "train mlp: unknown option --lr; did you mean --learning-rate?"),
        ("train mlp --depth 2 --bs=3", "train mlp: unknown option --bs; did you mean --batch-size?"),
        ("train --act relu", "train mlp: unknown option --act; did you mean --activation?"),
        ("train rnn --learnig_rate 1", "train rnn: unknown option --learnig-rate; did you mean --learning-rate?"),
        ("train --qqq", "train mlp: unknown option --qqq; fnn train mlp --help lists all options"),
        ("train --heads 2", "train mlp: unknown option --heads; it belongs to fnn train transformer"),
        ("compare a b --row 3", "compare: unknown option --row; did you mean --rows?"),
    ],
)
def test_unknown_option_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert main.main(arguments.split()) == 2 and capsys.readouterr().err.strip() == sentence


def test_held_out_labels_beyond_the_training_classes(tmp_path, capsys):
    x, y = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y * 4)
    assert main.main(["train", "--data", str(tmp_path / "a.npz"), "--batch-size", "8", "--epochs", "1"]) == 2
    sentence = "train: labels of the test part must occur in the training part, 0..1, got 4; split"
    assert capsys.readouterr().err.strip().startswith(sentence)


def test_commands_of_the_readme_are_understood_and_find_what_earlier_ones_made(monkeypatch):
    seen = []
    for name, (kind, _) in main.COMMANDS.items():
        monkeypatch.setitem(main.COMMANDS, name, (kind, lambda options: seen.append(options) or 0))
    block = re.search(r"```sh\n(fnn train.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S)
    text, made = re.sub(r"(?s)cat > (\S+) <<'END'.*?END\n", r"made \1\n", block.group(1)), []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "made":
            made.append(words[1])
            continue
        assert main.main(words[1:]) == 0, line
        needed = (
            words[2:]
            if words[1] in ("compare", "report")
            else [words[words.index("--file") + 1]]
            if "--file" in words
            else []
        )
        assert set(needed) <= set(made), line
        if "--out" in words:
            assert words[words.index("--out") + 1] not in made, line
            made.append(words[words.index("--out") + 1])
    trained = [options.model for options in seen if isinstance(options, train.Train)]
    assert {type(model).__name__.lower() for model in trained} >= {"mlp", "convnet", "rnn"} and len(made) == 4
