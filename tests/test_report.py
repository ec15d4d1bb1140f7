"""The report: what the figures are drawn from, the figures, and the page in a browser."""

import dataclasses
import json
import math
import re

import numpy as np
import polars as pl
import pytest
from report_folder import DEPTHS, SEEDS, made, put

from fnn.study import canvas, figures, methods, options, report, results, summary, verdict, words
from fnn.theory import meanfield

# One worker: the tests share the folders and the browser.
pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("study") / "tanh <b>&amp;", hole=(16, 0.5))


@pytest.fixture(scope="module")
def written(folder):
    return {path.name: path for path in report.report(folder)}


@pytest.fixture(scope="module")
def reduced(folder):
    return summary.summarize(results.read(folder).table())


def test_summary(reduced):
    assert reduced.axes == ["depth", "norm", "sigma_w"] and reduced.fixed == {"activation": "tanh"}
    networks = reduced.networks
    assert networks.height == 18 and networks["seeds"].unique().to_list() == [SEEDS]
    row = networks.filter((pl.col("depth") == 400) & (pl.col("norm") == "none") & (pl.col("sigma_w") == 2.0)).row(
        0, named=True
    )
    expected = math.log10(meanfield.fixed_point("tanh", 2.0, 0.0).chi) / 2
    assert row["log10_growth"] == pytest.approx(expected, rel=1e-9) == row["log10_growth_predicted"]
    assert row["outside"] == pytest.approx(2 / 5) and row["diverged"] == 1
    assert row["accuracy"] == pytest.approx(0.1 + 40 / 50 - 0.02)
    curve = reduced.layers.filter(
        (pl.col("network") == row["network"]) & (pl.col("series") == summary.ERROR) & (pl.col("step") == 0)
    ).sort("layer")
    np.testing.assert_allclose(curve["high"] - curve["middle"], 0.016, rtol=1e-6)  # 90 % of -2, -1, 0, 1, 2 hundredths
    np.testing.assert_allclose(curve["middle"], (400 - np.arange(1, 402)) * expected, atol=1e-9)
    assert set(reduced.layers["series"].unique()) == {summary.ERROR, "log10_kernel"}


def test_words():
    """Names of code become words; values keep what they say."""
    values = {"activation": "leaky_relu", "norm": "none", "depth": 64, "sigma_w": 1.3, "residual": False}
    values |= {"learning_rate": 1e6}
    assert ", ".join(verdict.label(*pair) for pair in values.items()) == (
        "leaky relu, no norm, depth 64, σ_w 1.3, not residual, learning rate 1e6"
    )
    assert [words.value(v) for v in (1e-5, 0.001, True, None, "a_b c", "__x__")] == [
        *("1e-5", "0.001", "yes", "none", "a_b c", "__x__")
    ]
    for name, axis in (
        ("log10_error at preactivation", "log10 |dL/dh|"),
        ("log10_error", "log10 |dL/dh|"),
        ("log10_kernel", "log10 |dL/dW|"),
        ("log10_kernel_rms", "log10 RMS of dL/dW"),
        ("log10_scale", "log10 |dL/d scale|"),
        ("log10_recurrent_kernel_rms", "log10 RMS of dL/d recurrent kernel"),
        ("second_moment at activation", "mean square"),
        ("input_second_moment", "input second moment"),
    ):
        told = words.quantity(name)
        assert (told.axis, told.log) == (axis, axis.startswith("log10")), name
    assert words.quantity("second_moment at activation").about == "mean square of the units after the activation"
    assert words.listed(["a", "b", "c"]) == "a, b and c" and words.listed(list("abcdefg")) == "a, b, c, d and 3 more"


def test_verdicts(reduced):
    """Vanishing and exploding are tenfold over the hidden layers; the sentences name who, and each network once."""
    networks = list(reduced.networks.iter_rows(named=True))
    chi = {s: meanfield.fixed_point("tanh", s, 0.0).chi for s in (0.5, 1.3, 2.0)}
    for row in networks:
        log = math.log10(chi[row["sigma_w"]] if row["norm"] == "none" else 1.3) / 2
        assert row["log10_growth"] == pytest.approx(log, abs=1e-9) or (row["depth"], row["sigma_w"]) == (16, 0.5)
        total = (row["depth"] - 1) * log
        expected = "vanishes" if total < -1 else "explodes" if total > 1 else "keeps its size"
        assert verdict.gradient(row) == expected
    first, train, off = verdict.sentences(reduced, 0.1, 40)
    assert "vanishes in 2 of 18 networks (no norm, σ_w 0.5, depth 16 and 400); explodes in 6 (" in first
    assert train.startswith("After 40 steps all 18 networks train.")
    assert "6 runs ended in a loss or gradient that is not finite: depth 4, no norm, σ_w 2 (1 of 5), " in train
    assert off.startswith("Outside of theory's band more often than the expected 5%: depth 4, no norm, σ_w 0.5 (40%)")
    row = {"accuracy": 0.54, "seeds": 5, "diverged": 2}
    judged = [
        verdict.training(row | more, 0.1) for more in ({}, {"accuracy": 0.55}, {"accuracy": 0.1}, {"diverged": 3})
    ]
    assert judged == ["learns little", "trains", "does not learn", "diverges"]
    assert verdict.training(row, None) is None


def test_report_writes_figures_and_a_page(folder, written):
    drawn = ("gradient", "weights", "heat", "training", "accuracy")
    names = {"report.html", *(name + end for name in drawn for end in report.FORMATS)}
    assert (
        set(written)
        == names
        == {path.name for path in folder.iterdir() if path.is_file() and path.suffix in (*report.FORMATS, ".html")}
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for name, path in written.items() if name.endswith("png"))
    assert written["heat.pdf"].read_bytes().startswith(b"%PDF") and "<svg" in written["heat.svg"].read_text()
    assert not [path for path in folder.iterdir() if ".part" in path.name]
    page = written["report.html"].read_text()
    assert len(page) < 3e6  # plotly alone is 4.8 MB where it is not compressed
    assert "<title>tanh &lt;b&gt;&amp;amp;: Gradients by depth, norm and σ_w</title>" in page
    assert page.count("</script>") == 3
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", page)
    assert '<a href="heat.pdf">PDF</a>' in page and "We measured 18 networks that differ in depth (4, 16, 400)" in page


def test_contents_are_thinned_and_finite(reduced):
    contents = report.contents(reduced)
    json.dumps(contents, allow_nan=False)
    curves = contents["layers"][summary.ERROR]["0"]
    lengths = [len(curve["x"]) for curve in curves.values()]
    assert max(lengths) == report.MOST_LAYERS and min(lengths) == 4
    deep = next(curve for curve in curves.values() if len(curve["x"]) == report.MOST_LAYERS)
    assert deep["x"][0] == 1 and deep["x"][-1] == 400
    broken = [curve for curve in curves.values() if None in curve["middle"]]
    assert broken and all(curve["middle"][1] is None for curve in broken)
    norms = contents["axes"][1]["values"]
    assert norms == ["none", "batch norm"]
    # One rounding in terminal and page: a browser would make 13 of 12.5.
    rows = reduced.networks.iter_rows(named=True)
    assert [n["percent"] for n in contents["networks"]] == [verdict.percent(row) for row in rows]
    assert verdict.percent({"outside": 0.125}) == "12%" and verdict.percent({"outside": None}) == ""
    critical = {norms[network["at"][1]]: network["critical"] for network in contents["networks"]}
    assert critical == {"none": 1.0, "batch norm": None}
    # Four hidden layers end at layer 4, not at the output's, of every quantity.
    for series in ("log10_error at preactivation", "log10_kernel"):
        assert {curve["x"][-1] for curve in contents["layers"][series]["0"].values()} == set(DEPTHS)
    kernels = next(iter(contents["layers"]["log10_kernel"]["0"].values()))
    assert kernels["middle"][-1] == pytest.approx(1, rel=1e-3)


def test_a_study_with_little_in_it(tmp_path):
    """One network, no training, no error signal: what can be drawn is drawn, nothing else is left lying about."""
    folder = made(tmp_path / "s", sigmas=(1.0,), norms=("none",), steps=(0,))
    frame = results.read(folder).table().filter((pl.col("cell") == 0) & (pl.col("quantity") == "log10_kernel"))
    for other in (folder / "cells").iterdir():
        other.unlink()
    put(folder, 0, frame)
    assert [path.name for path in report.report(folder)] == ["weights.png", "weights.svg", "weights.pdf", "report.html"]
    assert "1 of 3 cells are finished" in (folder / "report.html").read_text()
    bare = frame.filter(pl.col("step") < 0)  # nothing by layer at all, and an axis without values
    row = {"cell": 0, "depth": 4, "seed": 0, "step": 0, "layer": 0, "path": "", "quantity": "accuracy", "value": 0.5}
    bare = pl.concat([bare, pl.DataFrame([row | dict.fromkeys(set(bare.columns) - set(row))], schema=bare.schema)])
    put(folder, 0, bare)
    assert [written.name for written in report.report(folder)] == ["report.html"]


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold a study"):
        report.report(tmp_path)
    folder = made(tmp_path / "s", sigmas=(1.0,), norms=("none",), steps=(0,))
    (folder / "cells" / "00001.parquet").write_bytes(b"PAR1 torn")
    with pytest.warns(results.LeftOut, match="00001.parquet is damaged"):
        report.report(folder)
    said = (folder / "report.html").read_text()
    assert "2 of 3 cells are finished" in said and "Left out: " in said and "00001.parquet is damaged" in said
    for path in (folder / "cells").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no finished cell"):
        report.report(folder)


def test_the_gradients_figure_holds_the_numbers_of_the_table(folder, monkeypatch):
    figure = report.gradient(results.read(folder).table())
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 6 and titles[-1] == r"batch norm, $\sigma_w$ 2"
    lines = figure.axes[2].get_lines()  # no norm, sigma_w 2: for each depth the measured line and theory's
    assert [line.get_label() for line in lines[::2]] == [str(depth) for depth in DEPTHS]
    for depth, *drawn in zip(DEPTHS, lines[::2], lines[1::2], strict=True):
        layers = np.arange(1, depth + 1)  # the output's is left out
        expected = (depth - layers) * math.log10(meanfield.fixed_point("tanh", 2.0, 0.0).chi) / 2
        for line in drawn:  # the median seed lies on the prediction
            np.testing.assert_array_equal(line.get_xdata(), layers)
            np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-9)
    monkeypatch.setattr(canvas, "MOST_PANELS", 2)
    figure = report.gradient(results.read(folder).table())
    assert len(figure.axes) == 2 and figure.get_suptitle().endswith("the first 2 of 6 panels")
    assert "median of 5 seeds, shaded from 10th" in figure.get_suptitle().replace("\n", " ")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["4", "16", "400", "theory at this width"]
    assert report.gradient(results.read(folder).table().filter(quantity="log10_kernel")) is None


def test_looks_are_unique_and_scales_are_shared_or_said_to_differ(reduced):
    for n, ordered in ((3, True), (7, False), (20, False), (30, True)):
        looks = [(str(s["color"]), s["marker"], s.get("linestyle")) for s in canvas.styles(n, ordered)]
        assert len(set(looks)) == n
    figure = figures.gradient(reduced)
    assert "scales differ between panels" in figure.get_suptitle().replace("\n", " ")
    alike = figures.accuracy(reduced, 0.1)
    labels = [text.get_text() for text in alike.legends[0].get_texts()]
    assert len(labels) == 7 and labels[-1] == "chance (0.10)"
    wider = [reduced.networks.with_columns(pl.col("network") + 18 * k, width=pl.lit(8 * k)) for k in range(3)]
    finals = [reduced.finals.with_columns(pl.col("network") + 18 * k) for k in range(3)]
    more = reduced._replace(axes=[*reduced.axes, "width"], networks=pl.concat(wider), finals=pl.concat(finals))
    many = figures.accuracy(more, 0.1)  # 18 lines in six panels, each of which holds every sigma_w
    assert [len(axis.get_lines()) for axis in many.axes] == [4] * 6 and len({a.get_title() for a in many.axes}) == 6
    names = [rf"$\sigma_w$ {sigma:g}" for sigma in more.networks["sigma_w"].unique(maintain_order=True)]
    assert [text.get_text() for text in many.legends[0].get_texts()] == [*names, "chance (0.10)"]
    figure = figures.training(reduced)
    assert "differ" not in figure.get_suptitle() and len({axis.get_ylim() for axis in figure.axes}) == 1


def test_what_training_alone_sees_makes_no_second_panel(reduced):
    """At initialisation the learning rate changes nothing; where networks do differ, the axis is another one's and stays."""
    doubled = reduced.networks.with_columns(learning_rate=pl.lit(0.1))
    more = reduced.networks.with_columns(learning_rate=pl.lit(0.2), network=pl.col("network") + 18)
    both = reduced._replace(axes=[*reduced.axes, "learning_rate"], networks=pl.concat([doubled, more]))
    assert figures.at_start(both).networks["network"].to_list() == list(range(18))
    other = both._replace(
        networks=both.networks.with_columns(log10_first=pl.col("log10_first") + pl.col("learning_rate"))
    )
    assert figures.at_start(other) is other


def test_methods_and_the_command(folder, tmp_path):
    study = results.read(folder)
    assert methods.again(study).startswith("# Run from Python") and methods.chance(study) is None
    study = dataclasses.replace(study, folder=tmp_path)
    methods.remember(tmp_path, "fnn study --depth 4")
    assert methods.again(study) == "fnn study --depth 4"
    assert methods.load(study) == f"import fnn; table = fnn.results.read({str(tmp_path)!r}).table()"
    other = dataclasses.replace(study, sessions=[{**study.sessions[-1], "x64": True}])
    assert "JAX_ENABLE_X64=1" in methods._where(other) and "JAX_" not in methods._where(study)
    noted = options.about_data(((np.zeros((4, 2)), np.array([0, 1, 1, 1])), (np.zeros((4, 2)), np.array([0, 1, 1, 0]))))
    assert noted == {"chance": 0.5} and "chance" not in options.about_data((np.zeros((4, 2)), np.zeros(4)))


def test_page_in_a_browser(written, page, tmp_path):
    """It loads without network and console errors; rows, axes, the slider and keys change what is drawn, and stay."""
    state = "JSON.stringify(document.querySelector('#layers').data.map(t => [t.name, t.y]))"
    colours = "JSON.stringify(document.querySelector('#layers').data.filter(t => t.showlegend).map(t => [t.name, t.line.color]))"
    page.open(written["report.html"].as_uri())
    page.wait("document.body.dataset.ready === 'yes'")
    assert page.js("document.querySelector('h1').textContent") == "Gradients by depth, norm and σ_w"
    assert page.js("document.querySelector('.verdicts p').textContent").startswith("At initialisation the error signal")
    assert "cpu </script>" in page.js("document.querySelector('.facts').textContent")
    first, before = page.js(state), dict(json.loads(page.js(colours)))
    says = page.js("document.querySelector('#layers-says').textContent")
    assert "at initialisation" in says and "median of 5 seeds" in says and "(40%)" in says and "NaN" not in says
    page.click("button[data-axis='2'][data-value='2']")
    second, after = page.js(state), dict(json.loads(page.js(colours)))
    assert second != first and "σ_w 2" in second
    assert all(after[name] == colour for name, colour in before.items()) and len(after) > len(before)
    page.click("#networks tbody tr.shown")
    third = page.js(state)
    assert third != second and len(json.loads(third)) < len(json.loads(second))
    page.click("button[data-axis='2'][data-value='0']")  # a row that was hidden by hand stays hidden
    page.click("button[data-axis='2'][data-value='0']")
    assert page.js(state) == third
    hidden = "document.querySelector('#networks tbody tr:not(.shown)')"
    page.js(f"{hidden}.focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    assert page.js(state) != third and page.js("document.activeElement.className") == "shown"
    page.click("#all")
    assert page.js("document.querySelector('#hidden').textContent") == "18 of 18 networks are drawn."
    page.js(
        "(s => { s.value = 'log10_kernel'; s.dispatchEvent(new Event('change')) })(document.querySelector('#series'))"
    )
    assert "weight gradient" in page.js("document.querySelector('#layers-says').textContent")
    page.js("(s => { s.value = 1; s.dispatchEvent(new Event('input')) })(document.querySelector('#step'))")
    assert "after 40 steps" in page.js("document.querySelector('#layers-says').textContent")
    assert page.js("document.querySelector('#stepnow').textContent") == "40" and page.js(state) != third
    assert page.js("document.querySelector('#rate').data[0].type") == "heatmap"
    assert "σ_w = 1, it does not change" in page.js("document.querySelector('#rate-says').textContent")
    assert "not finite: 1 of 5 runs" in page.js("document.querySelector('#training-says').textContent")
    assert (
        page.js("document.querySelectorAll('.modebar-btn[data-title*=loud], .modebar-btn[data-title*=hare]').length")
        == 0
    )
    box = page.js(
        "(e => (e.scrollIntoView(), (r => [r.x, r.y, r.width, r.height])(e.querySelector('.nsewdrag').getBoundingClientRect())))(document.querySelector('#accuracy'))"
    )
    for share in np.linspace(0.02, 0.98, 60):
        page.move(box[0] + share * box[2], box[1] + 0.15 * box[3])
        if page.js("document.querySelectorAll('#accuracy .hovertext').length"):
            break
    page.wait("document.querySelectorAll('#accuracy .hovertext').length > 0")
    page.picture(tmp_path / "page.png")
    assert page.problems == [] and len(page.requests) >= 1
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_page_on_a_phone_in_the_dark(written, page):
    """Nothing is wider than 390 px, legends stand below, no figure is black on black; a figure is saved black on white."""
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        page.open(written["report.html"].as_uri())
        page.wait("document.body.dataset.ready === 'yes'")
        assert page.js("document.documentElement.scrollWidth") == 390
        layout = json.loads(page.js("JSON.stringify(document.querySelector('#layers').layout)"))
        assert layout["legend"]["orientation"] == "h"
        below = "r('.legend').top - r('.xtitle').bottom"  # of each figure that has a legend
        made = f"return [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.querySelector('.legend')).map(p => {{ const r = s => p.querySelector(s).getBoundingClientRect(); return {below}; }})"
        for now in ("", "dispatchEvent(new Event('beforeprint')); "):  # the second one is what is printed
            gaps = page.js(f"(() => {{ {now}{made} }})()")
            assert len(gaps) > 1 and min(gaps) > -4, gaps  # boxes are a little larger than their letters
        page.js("dispatchEvent(new Event('afterprint'))")
        assert page.js("document.documentElement.scrollWidth") == 390
        assert layout["font"]["color"] == "#e8e8e8" and "#000000" not in page.js("JSON.stringify(D.colours)")
        made = "light = true; const f = EVERY.layers(); light = false; return [f[1].font.color, f[1].paper_bgcolor]"
        assert page.js(f"(() => {{ {made} }})()") == ["#1a1a1a", "#fff"]
        page.js("Plotly.downloadImage = (f, o) => Plotly.toImage(f, o).then(u => window.made = u)")
        page.click("#layers-says + .export button")
        page.wait("window.made !== undefined")
        assert page.js("window.made").startswith("data:image/svg+xml")
        assert page.problems == []
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
        page.call("Emulation.setEmulatedMedia", features=[])
