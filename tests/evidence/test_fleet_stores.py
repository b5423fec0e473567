"""Fleets in object stores: through fsspec, in memory and as file:// URLs; and on Ray."""

from __future__ import annotations

import socket
from importlib import import_module
from pathlib import Path

import pytest
from libraries import tree, write_library

import adaptc
from adaptc.adapter import same
from adaptc.errors import AdaptcError, NeedsError, UsageError
from adaptc.evidence.fleet import Serial, order_of, plan, run
from adaptc.evidence.fleet_find import find
from adaptc.evidence.fleet_paths import STAGING, filesystem
from adaptc.evidence.fleet_ray import Ray
from adaptc.evidence.fleet_work import Result
from adaptc.evidence.manifest import history_of, manifest_of

fsspec = pytest.importorskip("fsspec")
NAMES = {"de/a1", "en/a0", "en/a2", "loose/style"}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_library(Path("library"))


def batch(source: str, out: str, engine: object = None, **how: bool) -> dict[str, Result]:
    with manifest_of(out) as manifest, engine or Serial() as workers:
        found = plan(find([source], out), order_of("truncate{rank=2}"), out, manifest.history, **how)
        return {r.name: r for r in run(found, out, manifest, workers)}


@pytest.fixture
def bucket(library: Path):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    fs.put(str(library), "/bucket/library", recursive=True)
    yield fs
    fs.store.clear()


@pytest.mark.parametrize("source", ["memory://bucket/library/**/", "memory://bucket/library",
                                    "memory://bucket/library/**/*.safetensors"])
def test_from_a_store_into_a_store(source: str, bucket, library: Path) -> None:
    results = batch(source, "memory://bucket/out")
    assert {r.name for r in results.values() if r.status == "done"} == NAMES
    files = {p.removeprefix("/bucket/out/") for p in bucket.find("/bucket/out")}
    assert files == {"manifest.jsonl", "summary.csv", "loose/style.safetensors", *(
        f"{n}/adapter_{f}" for n in NAMES - {"loose/style"} for f in ("model.safetensors", "config.json"))}
    bucket.get("/bucket/out", "copy", recursive=True)
    batch("library", "here")
    for name in tree(Path("here")) - {"manifest.jsonl", "summary.csv"}:
        assert Path("copy", name).read_bytes() == Path("here", name).read_bytes()
    assert {r.status for r in batch(source, "memory://bucket/out").values()} == {"same"}  # this store has no times


def test_a_store_remembers_on_another_machine(bucket, library: Path) -> None:
    batch("library", "memory://bucket/out")
    Path("bucket-out.manifest.jsonl").unlink()
    assert set(history_of("memory://bucket/out").finished) == NAMES
    assert batch("library", "memory://bucket/out") == {}
    bucket.rm_file("/bucket/out/en/a0/adapter_model.safetensors")
    bucket.pipe_file(f"/bucket/out/{STAGING}/left", b"half")
    results = batch("library", "memory://bucket/out")
    assert set(results) == {"en/a0"}
    assert results["en/a0"].status == "done"
    assert not bucket.exists(f"/bucket/out/{STAGING}")


def test_foreign_objects_stay(bucket, library: Path) -> None:
    bucket.pipe_file("/bucket/out/loose/style.safetensors", b"mine")
    results = batch("library", "memory://bucket/out")
    assert results["loose/style"].reason.startswith("memory://bucket/out/loose/style.safetensors exists")
    assert bucket.cat_file("/bucket/out/loose/style.safetensors") == b"mine"
    bucket.pipe_file("/bucket/out/en/a0/stale.bin", b"old")
    assert {r.status for r in batch("library", "memory://bucket/out", force=True).values()} == {"done"}
    assert not bucket.exists("/bucket/out/en/a0/stale.bin")


def test_schemes_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="scheme nonsense, which fsspec does not know"):
        filesystem("nonsense://x")
    monkeypatch.setitem(import_module("fsspec.registry").known_implementations, "absent",
                        {"class": "no_such_driver.FS", "err": "Install no_such_driver"})
    with pytest.raises(NeedsError, match="driver that is not installed") as refused:
        filesystem("absent://x")
    assert refused.value.hint == "Install no_such_driver"


def test_ray_does_the_same_work(library: Path) -> None:
    pytest.importorskip("ray")
    url = f"file://{library.resolve()}"
    results = batch(f"{url}/**/", f"file://{Path('out').resolve()}", Ray(1))
    assert {r.name for r in results.values() if r.status == "done"} == NAMES
    for result in results.values():
        made = adaptc.load(Path("out") / result.output)
        assert same(made, adaptc.run(adaptc.load(result.input.removeprefix("file://")), "truncate{rank=2}"))
    assert not any(STAGING in p for p in tree(Path("out")))


@pytest.mark.parametrize(("address", "error", "said"), [
    ("nowhere", UsageError, "is not host:port"), ("127.0.0.1:{free}", AdaptcError, "cannot be reached"),
    ("ray://127.0.0.1:{free}", AdaptcError, "cannot be reached"),
])
def test_a_cluster_that_is_not_there_is_one_line(address: str, error: type[Exception], said: str) -> None:
    pytest.importorskip("ray")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    with pytest.raises(error, match=said), Ray(1, address.format(free=free)):
        pytest.fail("connected")
