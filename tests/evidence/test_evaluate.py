"""eval: figures against direct computations with merged weights, heads, choices, bad data in one line."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from adapters import words, write_lora
from small_models import write_model

import adaptc
from adaptc.cli.main import main
from adaptc.evidence.evaluate import Settings, evaluate, task_of
from adaptc.evidence.metrics import value
from adaptc.evidence.model import load_model
from adaptc.evidence.ready import BASE, ready
from adaptc.evidence.rows import Row, read_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, adapters and data in one folder."""
    at = tmp_path_factory.mktemp("evaluate")
    write_model(at / "bert", "bert")
    write_model(at / "llama", "llama")
    write_lora(at / "sorted", "bert", classes=3, seed=1)
    write_lora(at / "other", "bert", classes=3, seed=2)
    write_lora(at / "bare", "bert", seed=3)
    write_lora(at / "two", "bert", classes=2, seed=4)
    write_lora(at / "writer", "llama", seed=5)
    (at / "rows.tsv").write_text("".join(f"{words(4 + i % 9, i)}\t{i % 3}\n" for i in range(40)))
    (at / "text.txt").write_text(words(70, 99))
    (at / "choice.jsonl").write_text("".join(
        json.dumps({"prompt": words(5, i) + " ", "choices": [words(2, i + 50), words(3, i + 90), words(1, i)],
                    "answer": i % 3}) + "\n" for i in range(12)))
    return at


def merged(model, adapter):
    """The model with dW added to its weights and the carried tensors in place: what running beside must equal."""
    with torch.no_grad():
        for key, delta in adapter.deltas.items():
            model.get_parameter(key).add_(delta.dense().float())
        for key, tensor in adapter.replaced.items():
            model.get_parameter(key).copy_(tensor)
    return model


def call(capsys, *args):
    code = main(["eval", *map(str, args), "--bootstrap", "50"])
    said = capsys.readouterr()
    return code, said.out, said.err


def metrics(out):
    data = json.loads(out)
    return [{m["metric"]: m for m in a["metrics"]} for a in data["adapters"]]


def test_classification_agrees_with_merged_weights(place, capsys):
    code, out, _ = call(capsys, place / "sorted", place / "other", "--base", place / "bert", "--data",
                        place / "rows.tsv", "--batch", 7, "--json")
    assert code == 0
    rows, logp = read_rows(place / "rows.tsv"), []
    for name in ("sorted", "other"):
        loaded = load_model(place / "bert", "classify", 3)
        model = merged(loaded.model, adaptc.load(place / name))
        tokens = loaded.tokenizer([r.text for r in rows], padding=True, return_tensors="pt")
        logp.append(model(**tokens).logits.log_softmax(-1).detach().double())
    label = torch.tensor([r.label for r in rows])
    kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean()
    for found, p in zip(metrics(out), logp, strict=True):
        assert found["accuracy"]["value"] == pytest.approx(float((p.argmax(-1) == label).double().mean()))
        assert found["nll"]["value"] == pytest.approx(-float(p.gather(1, label[:, None]).mean()), rel=1e-5)
    first, second = metrics(out)
    assert second["kl"]["value"] == pytest.approx(float(kl), rel=1e-4)
    assert first["kl"]["value"] == 0.0
    assert second["agreement"]["value"] == float((logp[0].argmax(-1) == logp[1].argmax(-1)).double().mean())
    gap = second["accuracy"]["value"] - first["accuracy"]["value"]
    assert second["accuracy"]["difference"] == pytest.approx(gap)


def test_perplexity_agrees_with_the_models_own_loss(place, capsys):
    code, out, _ = call(capsys, place / "writer", "none", "--base", place / "llama", "--data", place / "text.txt",
                        "--window", 20, "--max-windows", 3, "--json")
    assert code == 0
    loaded = load_model(place / "llama", "lm")
    ids = torch.tensor(loaded.tokenizer(words(70, 99))["input_ids"])[:60].split(20)
    for found, model in zip(metrics(out)[::-1], (loaded.model, None), strict=True):
        model = model or merged(loaded.model, adaptc.load(place / "writer"))
        losses = [float(model(input_ids=x[None], labels=x[None]).loss) for x in ids]
        assert found["perplexity"]["value"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert json.loads(out)["units"] == 3


def test_choices_are_scored_as_one_sequence_each(place):
    loaded = load_model(place / "llama", "lm")
    rows = read_rows(place / "choice.jsonl")
    assert task_of(rows) == "choice"
    said = evaluate(loaded, rows, {"none": BASE}, None, Settings("choice"))["none"]
    right = normed = 0
    for row in rows:
        start = len(loaded.tokenizer(row.text)["input_ids"])
        scores = []
        for ending in row.choices:
            ids = torch.tensor(loaded.tokenizer(row.text + ending)["input_ids"])
            logp = loaded.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            scores.append(float(logp[start - 1 : -1].gather(1, ids[start:, None]).sum()))
        right += scores.index(max(scores)) == row.label
        by_byte = [s / len(c) for s, c in zip(scores, row.choices, strict=True)]
        normed += by_byte.index(max(by_byte)) == row.label
    assert value("accuracy", said) == pytest.approx(right / 12)
    assert value("accuracy_normed", said) == pytest.approx(normed / 12)


def test_unlabelled_rows_still_have_kl(place, capsys, tmp_path):
    (tmp_path / "plain.tsv").write_text("".join(f"{words(5, i)}\n" for i in range(8)))
    args = (place / "sorted", place / "other", "--base", place / "bert", "--data", tmp_path / "plain.tsv", "--task",
            "classify", "--json")
    code, out, _ = call(capsys, *args)
    assert code == 0
    assert list(metrics(out)[1]) == ["kl", "agreement"]
    code, _, err = call(capsys, place / "sorted", *args[2:])
    assert code == 2
    assert err.startswith("adaptc: plain.tsv has no labels, and there is no second adapter to compare with")


def test_a_head_is_lent(place, capsys):
    base = ("--base", place / "bert", "--data", place / "rows.tsv")
    code, _, err = call(capsys, place / "bare", *base)
    assert code == 1
    assert "neither the base nor the adapter holds classifier" in err
    assert "--head-from" in err
    code, out, _ = call(capsys, place / "bare", "none", *base, "--head-from", place / "sorted", "--json")
    assert code == 0
    assert metrics(out)[1]["kl"]["value"] > 0
    donor = adaptc.load(place / "sorted")
    _, fitted = ready(place / "bert", "classify", {"bare": adaptc.load(place / "bare")}, donor)
    assert torch.equal(fitted["bare"].replaced["classifier.weight"], donor.replaced["classifier.weight"])


def test_the_model_is_left_as_it_was(place):
    loaded, fitted = ready(place / "bert", "classify", {"a": adaptc.load(place / "sorted")})
    before = {k: t.clone() for k, t in loaded.model.state_dict().items()}
    evaluate(loaded, read_rows(place / "rows.tsv")[:5], fitted, None, Settings("classify"))
    after = loaded.model.state_dict()
    assert all(torch.equal(t, after[k]) for k, t in before.items())


def test_csv_and_table(place, capsys, tmp_path):
    args = (place / "sorted", place / "other", "--base", place / "bert", "--data", place / "rows.tsv", "--csv",
            tmp_path / "t.csv")
    code, out, _ = call(capsys, *args)
    assert code == 0
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert {r["metric"] for r in rows} == {"accuracy", "nll", "kl", "agreement", "ece", "mce", "ace"}
    assert len(rows) == 14
    assert rows[0]["bytes"] == str(sum(f.stat().st_size for f in (place / "sorted").iterdir()))
    assert "40 rows, task classify" in out
    assert "not distinguishable" in out or "worse" in out or "better" in out
    assert call(capsys, *args)[0] == 2


@pytest.mark.parametrize(("text", "said"), [
    ("", "holds no rows"),
    ("w1 w2\t7\n", "row 1 has label 7, the classifier has 3 classes"),
    ("w1\t0\nw2\n", "row 2 has no label, 1 of 2 rows have one"),
    ("w1\tyes\n", "line 1 ends in 'yes', a class number is wanted"),
])
def test_bad_rows_are_one_line(place, capsys, tmp_path, text, said):
    (tmp_path / "bad.tsv").write_text(text)
    code, _, err = call(capsys, place / "sorted", "--base", place / "bert", "--data", tmp_path / "bad.tsv", "--task",
                        "classify")
    assert code == 1
    assert said in err.splitlines()[0]


@pytest.mark.parametrize(("rows", "said"), [
    ([{"prompt": "w1", "choices": ["w2"], "answer": 0}], "row 1 has 1 choices, at least 2 are wanted"),
    ([{"prompt": "w1", "choices": ["w2", "w3"], "answer": 2}], "row 1 has label 2 of 2 choices"),
    ([{"prompt": "w1 ", "choices": ["w2", ""], "answer": 0}], "adds no token"),
    ([{"prompt": "", "choices": ["w2", "w3"], "answer": 0}], "prompt without a token"),
    ([{"prompt": "w1 " * 70, "choices": ["w2", "w3"], "answer": 0}], "71 tokens, the model has 64 positions"),
])
def test_bad_choices_are_one_line(place, capsys, tmp_path, rows, said):
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, _, err = call(capsys, place / "writer", "--base", place / "llama", "--data", tmp_path / "bad.jsonl")
    assert code == 1
    assert said in err.splitlines()[0]


@pytest.mark.parametrize(("args", "code", "said"), [
    (("writer", "--base", "bert", "--head-from", "sorted"), 1, "model.layers"),
    (("sorted", "two", "--base", "bert"), 1, "has a classifier of 2 classes"),
    (("sorted", "sorted", "--base", "bert"), 2, "an adapter is named twice"),
    (("sorted", "--base", "bert", "--metric", "fame"), 2, "metric fame is not known"),
    (("sorted", "--base", "bert", "--metric", "perplexity"), 2, "perplexity cannot be measured here"),
    (("sorted", "--base", "bert", "--reference", "other"), 2, "is none of the 1 adapters"),
    (("sorted", "--base", "bert", "--batch", "0"), 2, "batch is 0, must be 1 or more"),
    (("sorted", "--base", "no/such/model"), 1, "no/such/model is no model that can be loaded"),
    (("writer", "--base", "llama", "--task", "lm", "--window", "100"), 2, "100 tokens at a time, the model has 64"),
])
def test_bad_requests_are_one_line(place, capsys, monkeypatch, args, code, said):
    monkeypatch.chdir(place)
    found, _, err = call(capsys, *args, "--data", "rows.tsv")
    assert (found, said in err.splitlines()[0]) == (code, True), err
    assert "Traceback" not in err


def test_a_base_without_its_tokenizer_is_named(place, capsys, tmp_path):
    folder = tmp_path / "mute"
    folder.mkdir()
    for file in (place / "bert").iterdir():
        if not file.name.startswith("token"):
            (folder / file.name).write_bytes(file.read_bytes())
    code, _, err = call(capsys, place / "sorted", "--base", folder, "--data", place / "rows.tsv")
    assert code == 1
    assert err.startswith(f"adaptc: {folder} holds no tokenizer")
    assert len(err.splitlines()) == 1


def test_the_task_is_told_by_the_rows():
    assert task_of([Row("a", 1), Row("b", 0)]) == "classify"
    assert task_of([Row("a", 1), Row("b")]) == "lm"
    assert task_of([Row("a", 0, ("x", "y"))]) == "choice"
