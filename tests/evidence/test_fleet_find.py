"""Which adapters a fleet is made of, and under which names they come out."""

from __future__ import annotations

from pathlib import Path

import pytest
from libraries import tree, write_kohya, write_library, write_peft

from adaptc.errors import UsageError
from adaptc.evidence.fleet_find import find


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_library(Path("library"))


def names(*arguments: str, out: str = "out", root: str | None = None) -> list[str]:
    return sorted(u.name for u in find(arguments, out, root))


EVERYTHING = ["de/a1", "en/a0", "en/a2", "loose/style"]


@pytest.mark.parametrize("arguments", [
    ("library/**/",), ("library",), ("library/",), ("library/**/*",), ("library/**",), ("library/**/*.safetensors",),
    ("library/", "library/en/", "library/en/a0/", "library/loose/style.safetensors"), ("./library/**/",),
])
def test_every_adapter_counts_once(arguments: tuple[str, ...], library: Path) -> None:
    assert names(*arguments) == EVERYTHING


def test_globs_mean_what_a_shell_means(library: Path) -> None:
    assert names("library/*/a0") == ["en/a0"]
    assert names("library/en/a[!0]/") == ["a2"]
    assert names("library/en/a?") == ["a0", "a2"]
    assert names("library/*/*.safetensors") == ["loose/style"]
    assert names("library/*/*/*.safetensors") == ["de/a1", "en/a0", "en/a2"]


def test_a_list_and_single_paths(library: Path) -> None:
    Path("list.txt").write_text("# mine\nlibrary/en/a0\n\nlibrary/de/a1/adapter_model.safetensors\n")
    assert names("list.txt") == ["de/a1", "en/a0"]
    assert names("library/en/a0", "library/de/a1") == ["de/a1", "en/a0"]
    assert names("library/en/a0") == ["a0"]
    assert names("library/en/a0", root=".") == ["library/en/a0"]
    (unit,) = find(["library/en/a0"], "out")
    assert unit.nbytes == sum(p.stat().st_size for p in Path("library/en/a0").iterdir())


def test_links_are_followed_once(library: Path) -> None:
    (library / "loop").symlink_to(Path("..").resolve() / library, target_is_directory=True)
    (library / "again").symlink_to((library / "en" / "a0").resolve(), target_is_directory=True)
    assert len(find(["library"], "out")) == 4


def test_outputs_are_never_inputs(library: Path) -> None:
    write_peft(library / "out" / "en" / "a0")
    assert names("library/**/", out="library/out") == EVERYTHING


def test_equal_names_keep_their_suffixes_and_nested_ones_lie_beside(library: Path) -> None:
    write_kohya(library / "loose" / "style.bin")
    write_peft(library / "en" / "a0" / "checkpoint-5")
    assert names("library") == ["de/a1", "en/a0", "en/a0-checkpoint-5", "en/a2", "loose/style.bin",
                                "loose/style.safetensors"]


def test_two_adapters_for_one_output_are_refused(library: Path) -> None:
    write_library(Path("other"))
    with pytest.raises(UsageError, match="would both be written to") as refused:
        find(["library/**/", "other/**/"], "out")
    assert "--root" in str(refused.value.hint)
    assert len(find(["library/**/", "other/**/"], "out", ".")) == 8


@pytest.mark.parametrize(("argument", "said"), [
    ("empty", "empty holds no adapter file"), ("nowhere", "nowhere does not exist"),
    ("nowhere.txt", "list nowhere.txt does not exist"), ("library/*.bin", "holds no adapter file"),
])
def test_nothing_to_do_is_told(argument: str, said: str, library: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=said):
        find([argument], "out")


def test_stamp_changes_with_the_file(library: Path) -> None:
    (before,) = find(["library/en/a0"], "out")
    assert before.stamp == find(["library/en/a0"], "out")[0].stamp
    file = library / "en" / "a0" / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    assert find(["library/en/a0"], "out")[0].stamp != before.stamp
    assert "en/a0/adapter_config.json" in tree(library)
