"""What a source names: files, their names and stamps."""

from __future__ import annotations

import os
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from oracle.errors import InputError, InputTypeError, MissingFileError
from surrogate.scoring.files import list_inputs, open_input


def names(source, **options):
    return [file.name for file in list_inputs(source, **options).files]


def touch(path, content=b"{}\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_name_is_the_path_below_what_was_named(tmp_path):
    touch(tmp_path / "b" / "x.jsonl")
    touch(tmp_path / "b" / "a" / "y.jsonl.gz")
    assert names(tmp_path / "b") == ["a/y.jsonl.gz", "x.jsonl"]
    assert names(str(tmp_path / "*" / "*.jsonl")) == ["b/x.jsonl"]
    assert names([tmp_path / "b" / "x.jsonl"]) == ["x.jsonl"]
    assert names(str(tmp_path / "**" / "*.jsonl*")) == ["b/a/y.jsonl.gz", "b/x.jsonl"]


def test_names_stay_when_the_corpus_grows(tmp_path):
    touch(tmp_path / "en" / "1.jsonl")
    before = names(str(tmp_path / "*" / "*.jsonl"))
    touch(tmp_path / "de" / "1.jsonl")
    assert set(before) < set(names(str(tmp_path / "*" / "*.jsonl")))


def test_files_of_one_name_in_different_folders_keep_their_folders(tmp_path):
    paths = [touch(tmp_path / folder / "x.jsonl") for folder in ("a", "b")]
    assert names(paths) == ["a/x.jsonl", "b/x.jsonl"]


def test_a_file_that_is_named_twice_is_one_file(tmp_path):
    path = touch(tmp_path / "x.jsonl")
    assert names([path, str(tmp_path / "*.jsonl"), tmp_path]) == ["x.jsonl"]


def test_what_is_no_data_is_left_out_and_counted(tmp_path):
    for name in ("x.parquet", "README.md", "_SUCCESS.json", ".cache/y.jsonl", "state.json", "table.csv"):
        touch(tmp_path / name)
    listing = list_inputs(tmp_path)
    assert [file.name for file in listing.files] == ["x.parquet"]
    assert listing.num_ignored == 5


def test_folders_with_names_of_files_are_entered(tmp_path):
    touch(tmp_path / "out.parquet" / "part-0.parquet")
    (tmp_path / "empty.parquet").mkdir()
    listing = list_inputs(str(tmp_path / "*.parquet"))
    assert [file.name for file in listing.files] == ["out.parquet/part-0.parquet"]
    assert list(listing.failed) == [str(tmp_path / "empty.parquet")]


def test_links_are_followed_once_and_broken_ones_reported(tmp_path):
    touch(tmp_path / "real" / "x.jsonl")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    listing = list_inputs(tmp_path / "real")
    assert [file.name for file in listing.files] == ["x.jsonl"]
    assert listing.failed == {str(tmp_path / "real" / "gone.jsonl"): "a broken symbolic link"}


def test_a_stamp_changes_with_the_file(tmp_path):
    path = touch(tmp_path / "x.jsonl")
    before = list_inputs(path).files[0]
    assert list_inputs(path).files[0] == before
    os.utime(path, ns=(1, 1))
    assert list_inputs(path).files[0].stamp != before.stamp


def test_urls_are_listed_and_opened():
    with fsspec.open("memory://corpus/a/x.jsonl", "wb") as file:
        file.write(b'{"text": "one"}\n')
    for source in ("memory://corpus/a/x.jsonl", "memory://corpus", "memory://corpus/*/*.jsonl"):
        (file,) = list_inputs(source).files
        assert file.name.endswith("x.jsonl") and file.num_bytes == 16
        with open_input(file.url) as opened:
            assert opened.read() == b'{"text": "one"}\n'


def test_a_hub_dataset_is_the_files_of_its_split(tmp_path, monkeypatch):
    import datasets

    files = {"train": [str(touch(tmp_path / "hub" / "data" / f"train-{part}.jsonl")) for part in range(2)]}
    config = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: config)
    monkeypatch.chdir(tmp_path)
    assert names("some-org/some-data") == ["train-0.jsonl", "train-1.jsonl"]
    with pytest.raises(InputError, match="no split 'test'"):
        list_inputs("some-org/some-data", split="test")


def test_what_is_not_there_is_refused_at_once(tmp_path):
    touch(tmp_path / "texts.jsonl")
    with pytest.raises(MissingFileError, match=r"did you mean 'texts\.jsonl'"):
        list_inputs(tmp_path / "text.jsonl")
    with pytest.raises(MissingFileError, match="no file matches"):
        list_inputs(str(tmp_path / "*.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="holds no data file"):
        list_inputs(tmp_path / "empty")


def test_what_cannot_be_a_corpus_is_refused(tmp_path):
    with pytest.raises(InputError, match="ending that is not known"):
        list_inputs(touch(tmp_path / "table.csv"))
    with pytest.raises(InputTypeError, match="is no corpus of files"):
        list_inputs({"text": ["a"]})
    with pytest.raises(InputError, match="protocol"):
        list_inputs("nothing://x/y.jsonl")


def test_files_whose_scores_could_have_no_name_are_told(tmp_path):
    """Keys of object stores may be anything; `a//x` would be `/x` below `a/`, outside the output folder."""
    filesystem = fsspec.filesystem("memory")
    bad = ["strange/a//x.jsonl", "strange/" + "ä" * 130 + ".jsonl"]
    for name in [*bad, "strange/good.jsonl"]:
        filesystem.store["/" + name] = MemoryFile(filesystem, "/" + name, b"{}")
    listing = list_inputs("memory://strange")
    assert [file.name for file in listing.files] == ["good.jsonl"]
    assert len(listing.failed) == 2 and sum("longer than" in reason for reason in listing.failed.values()) == 1
    touch(tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
    assert list_inputs(tmp_path).failed == {f"{tmp_path}/caf\\udce9.jsonl": "its name is not valid UTF-8"}


def test_a_mistyped_path_below_a_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "good").mkdir(parents=True)
    monkeypatch.setattr("surrogate.scoring.files._hub_files", lambda *given: pytest.fail("asked the hub"))
    with pytest.raises(MissingFileError, match="did you mean 'good'"):
        list_inputs("corpus/god")


def test_a_file_system_that_cannot_be_reached_is_named(monkeypatch):
    def away(self, path, **options):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.exists", away)
    with pytest.raises(InputError, match=r"memory://x/y\.jsonl cannot be reached: RuntimeError: no route"):
        list_inputs("memory://x/y.jsonl")
