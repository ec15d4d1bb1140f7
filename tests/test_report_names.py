"""A report of a study full of names that could be more than names, and of axes unlike ours."""

import base64
import collections
import gzip
import html.parser
import json
import os
import re

import polars as pl
import pytest
from report_folder import put

from fnn.study import report, results, summary, table

# One worker, that of test_report: the tests share the browser.
pytestmark = pytest.mark.xdist_group("report")

HOSTILE = (
    *("<!--<script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "__proto__", "constructor"),
    *("$x$ $", "$\\frac$", "\u2028\u2029", "a & b &amp; <b>", "{{DATA}}", "%{x}", "\0\x1b[31m", "'\"\\`${1}", "rate", "low_"),
    *("<a href='https://example.org'>l</a>", "javascript:alert(1)", "seeds", "accuracy", "network", "series", "middle"),
)  # fmt: skip


def hostile(folder):
    """Write a study whose folder, axes, values, quantities, paths and sessions are called what could be more than a name."""
    types = {"depth": "int"} | dict.fromkeys(HOSTILE, "str") | {"seed": "int"}
    static = [
        {"depth": depth} | {name: HOSTILE[(i + k) % len(HOSTILE)] for k, name in enumerate(HOSTILE)}
        for i in range(3)
        for depth in (1, 2)
    ]
    runs = [{"seed": 0}, {"seed": 1}]
    cells = [{"static": part, "runs": runs, "steps": [0, 1], "chunk": 2} for part in static]
    axes = {"static": ["depth", *HOSTILE], "traced": ["seed"]}
    description = {"format": results.FORMAT, "axes": axes, "types": types, "cells": cells, "steps": [0, 1]}
    (folder / "cells").mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(description))
    session = {"versions": dict.fromkeys(HOSTILE, HOSTILE[0]), "devices": HOSTILE, "commit": HOSTILE[0]}
    (folder / "sessions.json").write_text(json.dumps([session]))
    places = [(layer, name, f"{layer}/{name}") for layer in (1, 2, 3) for name in HOSTILE]
    places += [(layer, "log10_error", f"{layer}/preactivation") for layer in (1, 2, 3, 4)]
    places += [(0, name, "") for name in ("train_loss", "accuracy", "diverged", *HOSTILE)]
    for number, part in enumerate(static):
        rows = [
            {"cell": number, **part, **run, "step": step, "layer": layer, "quantity": quantity, "path": path}
            | {
                "role": "preactivation" if quantity == "log10_error" and path else "",
                "value": 0.0 if quantity == "diverged" else 0.5 + layer + run["seed"],
            }
            for run in runs
            for step in (0, 1)
            for layer, quantity, path in places
        ]
        put(folder, number, pl.DataFrame(rows, schema=table.schema(types)))
    return folder


class Tags(html.parser.HTMLParser):
    """Counts a page's elements."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def handle_starttag(self, tag, attrs):
        self.found[tag] += 1


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What is written about a study full of names that could be more than names."""
    folder = hostile(tmp_path_factory.mktemp("names") / os.fsdecode(b"<!--<script> $\\frac$ \xff"))
    return {path.name: path for path in report.report(folder)}


def test_a_name_is_only_a_name(names):
    """Nothing that a study holds ends the page's data, or is a formula to matplotlib, or another axis to a table."""
    assert set(names) >= {"gradient.png", "training.png", "accuracy.png", "report.html"}
    data = re.search('id="data">([A-Za-z0-9+/=]*)<', names["report.html"].read_text())
    contents = json.loads(gzip.decompress(base64.b64decode(data[1])))
    shown = {name: f"{name} (axis)" if name in summary.OWN else name for name in HOSTILE}
    assert [axis["word"] for axis in contents["axes"]] == ["depth", *shown.values()]
    for k, axis in enumerate(contents["axes"][1:]):
        assert axis["values"] == [HOSTILE[(i + k) % len(HOSTILE)] for i in range(3)]
    assert set(HOSTILE) <= set(contents["runs"]) and all(network["seeds"] == 2 for network in contents["networks"])
    assert {network["accuracy"] for network in contents["networks"]} == {1.0}
    parser = Tags()
    parser.feed(names["report.html"].read_text())
    assert parser.found["script"] == 3 and not {"img", "iframe", "object"} & set(parser.found)
    assert parser.found["a"] == 3 * 3 and parser.found["title"] == parser.found["h1"] == 1


def test_axes_of_other_kinds_than_ours_are_no_obstacle(tmp_path):
    """A net of one's own may call a word `depth` or `sigma_w`, have one network named by a word, a loss below zero."""
    for i, values in enumerate(([{"sigma_w": "x", "depth": "y"}, {"sigma_w": "z", "depth": "w"}], [{"first": "only"}])):
        folder = tmp_path / str(i)
        (folder / "cells").mkdir(parents=True)
        types = dict.fromkeys(values[0], "str") | {"sigma_b": "str", "seed": "int"}
        cells = [{"static": v | {"sigma_b": "b"}, "runs": [{"seed": 0}], "steps": [0], "chunk": 1} for v in values]
        axes = {"static": [*values[0], "sigma_b"], "traced": ["seed"]}
        description = {"format": results.FORMAT, "axes": axes, "types": types, "cells": cells, "steps": [0]}
        (folder / "study.json").write_text(json.dumps(description))
        for number, part in enumerate(cells):
            rows = [
                {
                    "cell": number,
                    **part["static"],
                    "seed": 0,
                    "step": step,
                    "layer": 0,
                    "path": "",
                    "quantity": quantity,
                }
                | {"value": -1.0}
                for step in (0, 1)
                for quantity in ("train_loss", "accuracy")
            ]
            put(folder, number, pl.DataFrame(rows, schema=table.schema(types)))
        assert [p.name for p in report.report(folder)][::3] == ["training.png", "report.html"]


def test_a_name_is_only_a_name_in_a_browser(names, page):
    choose = """
        for (const id of ['series', 'run']) for (const o of document.getElementById(id).options) {
          o.parentElement.value = o.value; o.parentElement.dispatchEvent(new Event('change')); }
        for (const button of [...document.querySelectorAll('#axes button')].slice(0, 8)) button.click();
    """
    page.open(names["report.html"].as_uri())
    page.wait("document.querySelectorAll('#layers .scatterlayer .trace').length > 0")
    axes = json.loads(page.js("JSON.stringify([...document.querySelectorAll('#axes legend')].map(b => b.textContent))"))
    assert axes == ["depth", *(f"{name} (axis)" if name in summary.OWN else name for name in HOSTILE)]
    assert page.js("document.querySelectorAll('#networks tbody tr').length") == 6
    assert "</script>" in page.js("document.querySelector('.legendtext').textContent")
    page.js(f"(() => {{ {choose} }})()")
    assert page.js("document.querySelectorAll('.figure a, .figure b, .figure img, .facts *:not(p)').length") == 0
    assert page.problems == []
