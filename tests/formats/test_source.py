"""What the user named, opened: which file, which config, and nothing executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from files import noise, put, put_config

from adaptc.errors import AdaptcError, FormatError, UnsupportedError, UsageError
from adaptc.formats.config_json import parse_config
from adaptc.formats.flat_yaml import read_flat_yaml
from adaptc.formats.source import open_source

PAIR = {"x.lora_A.weight": noise(2, 4), "x.lora_B.weight": noise(3, 2)}


def test_a_folder_gives_its_adapter_file_and_config(tmp_path: Path) -> None:
    put_config(tmp_path, {"peft_type": "LORA"})
    put(tmp_path / "optimizer.bin", {"x": noise(1)})
    put(tmp_path / "adapter_model.safetensors", PAIR)
    source = open_source(tmp_path)
    assert source.file.name == "adapter_model.safetensors"
    assert source.config == {"peft_type": "LORA"}
    assert source.folder


def test_the_file_of_a_folder_brings_its_config_along(tmp_path: Path) -> None:
    put_config(tmp_path, {"fine_tune_type": "lora"})
    for name in ("adapter_model.safetensors", "0000100_adapters.safetensors"):
        source = open_source(put(tmp_path / name, PAIR))
        assert source.config == {"fine_tune_type": "lora"}
    assert open_source(put(tmp_path / "other.safetensors", PAIR)).config == {}
    assert open_source(put(tmp_path / "adapter_0.pt", PAIR)).config == {}  # torchtune's own, beside a PEFT export


def test_two_candidates_are_not_guessed_between(tmp_path: Path) -> None:
    put(tmp_path / "a.safetensors", PAIR)
    put(tmp_path / "b.safetensors", PAIR)
    with pytest.raises(UsageError, match=r"2 files that could be the adapter: a\.safetensors, b\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_both_generations(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    held = {k: torch.nn.Parameter(t) for k, t in PAIR.items()}
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    tensors = open_source(path).tensors
    assert all(torch.equal(tensors[k], t) and not tensors[k].requires_grad for k, t in PAIR.items())


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_checkpoints_are_looked_into(wrapper: str, tmp_path: Path) -> None:
    torch.save({wrapper: PAIR, "epoch": 3}, tmp_path / "x.ckpt")
    assert set(open_source(tmp_path / "x.ckpt").tensors) == set(PAIR)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name, data in (("a.pt", pickle.dumps({"x": Evil()}, 2)), ("b.safetensors", pickle.dumps(Evil(), 4))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AdaptcError, match=r"refused|not a torch file"):
            _ = open_source(tmp_path / name).payload
    torch.save({"x": Evil()}, tmp_path / "c.bin")
    with pytest.raises(UnsupportedError, match=r"asks for posix\.mkdir"):
        _ = open_source(tmp_path / "c.bin").payload
    assert not (tmp_path / "ran").exists()


def test_any_header_length_of_a_safetensors_file_is_one(tmp_path: Path) -> None:
    """A length of 128 (0x80) starts like a pickle, one of 20560 (PP) or 19280 (PK) like an archive."""
    for pad in range(0, 160, 8):
        path = put(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {"p": "." * pad})
        for name in ("y.safetensors", "y.bin"):
            assert set(open_source(path.replace(tmp_path / name)).tensors) == {"a"}
            path = tmp_path / name
    big = put(tmp_path / "z.safetensors", {"a": torch.ones(2)}, {"p": "." * (0x4B50 - 79)})
    assert big.read_bytes()[:2] == b"PK"
    assert set(open_source(big).tensors) == {"a"}


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3), np.float32), y=np.ones(2, np.float16))
    tensors = open_source(tmp_path / "a.npz").tensors
    assert tensors["x"].dtype == torch.float32
    assert tensors["y"].dtype == torch.float16
    np.savez(tmp_path / "b.npz", x=np.array([{}], object))
    with pytest.raises(FormatError, match="numeric arrays"):
        _ = open_source(tmp_path / "b.npz").payload


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0])
def test_alpha_must_be_a_number(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="alpha"):
        open_source(put(tmp_path / "x.safetensors", PAIR), alpha=alpha)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("pipe", "loop", "missing.safetensors", "a\0b", "x" * 300, "../../nobody"):
        with pytest.raises(AdaptcError):
            open_source(tmp_path / name)


def test_config_with_fields_of_the_wrong_type() -> None:
    assert parse_config('{"r": 1e2, "rank_pattern": null, "x": [{"y": NaN}]}', "c")["r"] == 100
    for text, says in (('{"rank_pattern": []}', "not an object"), ('{"target_parameters": "x"}', "not a list"),
                       ('{"peft_type": 3}', "not text"), ("[1]", "not a JSON object"), ("{", "not JSON"),
                       ('{"token_indices": [-1]}', "row numbers"), ('{"trainable_token_indices": {"e": [1.5]}}', "row"),
                       ('{"a": ' + "9" * 30 + "}", "not JSON"), ('{"a":' * 70 + "1" + "}" * 70, "nested deeper"),
                       ('{"a": "\\udc00"}', "surrogate")):
        with pytest.raises(FormatError, match=says):
            parse_config(text, "c")


def test_flat_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: 1\nb: 0.5  # half\nc: lora-bihead\nd: true\ne:\n  f: 2\n"
                    "g: 'q'\n- h: 1\n# i: 1\nj: null\nk: 1e-3\n")
    assert read_flat_yaml(path) == {"a": 1, "b": 0.5, "c": "lora-bihead", "d": True, "e": None, "g": "q", "j": None,
                                    "k": 1e-3}
    assert read_flat_yaml(tmp_path / "absent.yaml") == {}
