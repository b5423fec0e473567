"""What people see: aligned text in a pipe, a table on a terminal, JSON that is JSON, groups of modules."""

from __future__ import annotations

import json
import math

import pytest

from adaptc.bytesize import print_nbytes, read_nbytes, short_nbytes
from adaptc.cli.render import Facts, Notes, Table, Voice, _cells, _show_rich, listed, number, spread
from adaptc.errors import UsageError
from adaptc.grouping import layer_type

TABLE = Table(("module", "kind", ">count"), [("q", "lowrank", "3"), ("longer", "sparse", "12")], ("all", "", "15"),
              spare=("kind",))


def test_text_is_aligned_and_escapes_control_characters(capsys):
    Voice().show({}, Facts([("base", "x\x1b[31m"), ("none", None)]), TABLE, Notes([]), Notes(["odd"], wrong=True))
    assert capsys.readouterr().out == (
        "base  x\\x1b[31m\n\n"
        "module  kind     count\nq       lowrank      3\nlonger  sparse      12\nall                 15\n\n! odd\n")


def test_terminal_shows_the_same_words(capsys):
    _show_rich([Facts([("base", "tiny [bold]")]), TABLE, Notes(["odd"], wrong=True), "done"])
    words = capsys.readouterr().out.split()
    for word in ("base", "tiny", "[bold]", "lowrank", "12", "15", "!", "odd", "done"):
        assert word in words


def test_narrow_terminal_drops_spare_columns_only_when_it_must():
    assert _cells(TABLE, 80)[0] == ["module", "kind", ">count"]
    assert _cells(TABLE, 20)[0] == ["module", ">count"]


def test_json_has_no_infinities(capsys):
    Voice(json=True, quiet=True).show({"a": math.inf, "b": [math.nan, 1.5], "c": {"d": (1, None)}}, "text")
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [1, None]}}


def test_quiet_and_pipe_draw_no_progress(capsys):
    for voice in (Voice(), Voice(quiet=True), Voice(json=True)):
        with voice.progress() as progress:
            assert progress is None
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_counts_and_leaves_nothing(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Voice().progress() as progress:
        for done in (1, 2):
            progress("spectra", done, 2)
        progress("truncate", 1, 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("key", "kind"), [
    ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj"),
    ("bert.encoder.layer.11.attention.output.dense.weight", "attention.output.dense"),
    ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight", "attn1.to_out.*"),
    ("down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight", "net.*.proj"),
    ("model.layers.0.mlp.experts.down_proj", "mlp.experts.down_proj"), ("lm_head.weight", "lm_head"),
    ("layers.2.linear.bias", "linear.bias"), ("0.weight", "*"),
])
def test_layer_type(key, kind):
    assert layer_type(key) == kind


@pytest.mark.parametrize(("text", "nbytes"), [
    ("2MiB", 2 * 2**20), ("1.5MB", 1_500_000), ("500KB", 500_000), ("4096", 4096), ("12 kib", 12288), ("1B", 1),
    (".5GiB", 2**29), ("0.1MB", 100_000), ("1.0000001GB", 1_000_000_100),
])
def test_sizes(text, nbytes):
    assert read_nbytes(text) == nbytes
    assert read_nbytes(short_nbytes(nbytes)) == nbytes


@pytest.mark.parametrize("text", ["", "2M", "-1MB", "1e6", "MB", "0", "0.1B", "2TB", "1 2", "2MiBs", "nan"])
def test_sizes_refused(text):
    with pytest.raises(UsageError, match="size"):
        read_nbytes(text)


@pytest.mark.parametrize(("nbytes", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (10**6, "977 KiB"), (1023 * 1024, "1.00 MiB"),
    (12 * 2**20, "12.0 MiB"), (3 * 2**40, "3.00 TiB"),
])
def test_sizes_for_people(nbytes, text):
    assert print_nbytes(nbytes) == text


def test_short_forms():
    assert [number(v) for v in (None, 0, 0.04321, 1.2e-7, math.inf)] == ["-", "0", "0.0432", "1.2e-07", "inf"]
    assert [spread(v) for v in ([8, 8], [3, None, 17], [], [2.0, 2.0])] == ["8", "3..17", "-", "2"]
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"
