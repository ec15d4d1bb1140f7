"""The script for an accelerator keeps to its time limits, and loses nothing that was measured."""

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import jax
import pytest

from bench import __main__ as command
from bench import accelerator, kernels
from bench.emitter import Part

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


HLO = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %loop_add = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %loop_add)
}

ENTRY %main (a: bf16[4,8], b: bf16[8,8]) -> f32[] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %gemm = (f32[4,8]{1,0}, s8[32]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
  %y = f32[4,8]{1,0} get-tuple-element(%gemm), index=0
  %w = (s32[], f32[4,8]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %sum = f32[] fusion(%y), kind=kInput, calls=%fused.1
}
"""


def test_kernels_are_counted_with_the_bytes_that_they_move():
    entry, body = kernels.kernels(HLO)
    assert [(k.kind, k.moved, k.product) for k in entry] == [
        ("__cublas$lt$matmul", 2 * 32 + 2 * 64 + 4 * 32 + 32, True),
        ("fusion", 4 * 32 + 4, False),
    ]
    assert [(k.name, k.moved) for k in body] == [("loop_add", 2 * 4 * 32)]


def test_without_a_gpus_compiler_there_is_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit, match="kernels: XLA's compiler for a GPU must be installed"):
        command.main(["--suite", "kernels", "--rows", "lstm", "--precision", "default", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        command.main(["--suite", "kernels", "--rows", "64x3"])
    assert "64x3: must be one of mlp-bf16" in capsys.readouterr().err
