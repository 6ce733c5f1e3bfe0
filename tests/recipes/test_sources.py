import sys
import zipfile
from pathlib import Path

import datasets
import pytest
import sources
from arguments import DataArguments
from sources import read_enwik8, read_stdlib, read_text, read_wikitext103


@pytest.fixture(scope="module")
def enwik8_file(tmp_path_factory):
    """A file of the size of enwik8, zeros but for the first byte of each split."""
    path = tmp_path_factory.mktemp("enwik8") / "enwik8"
    with path.open("wb") as file:
        file.truncate(100_000_000)
        for position, mark in ((0, b"a"), (90_000_000, b"b"), (95_000_000, b"c")):
            file.seek(position)
            file.write(mark)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_enwik8_is_split_90_5_5_from_the_file_or_its_zip(enwik8_file, zipped, tmp_path):
    path = enwik8_file
    if zipped:
        path = tmp_path / "enwik8.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.write(enwik8_file, "enwik8")
    splits = read_enwik8(DataArguments(dataset="enwik8", data_file=str(path)))
    assert {name: (len(split), split[:1]) for name, split in splits.items()} == {
        "train": (90_000_000, b"a"),
        "valid": (5_000_000, b"b"),
        "test": (5_000_000, b"c"),
    }


def test_enwik8_of_the_wrong_size_names_file_and_sizes(tmp_path):
    path = tmp_path / "enwik8"
    path.write_bytes(b"x" * 1234)
    with pytest.raises(ValueError, match=r"enwik8` has 1,234 bytes.*100,000,000.*--data_file.*--dataset text"):
        read_enwik8(DataArguments(dataset="enwik8", data_file=str(path)))


def test_only_the_original_enwik8_goes_without_a_warning(tmp_path, monkeypatch, caplog):
    path = tmp_path / "enwik8"
    path.write_bytes(b"abc")
    monkeypatch.setattr(sources, "ENWIK8_BYTES", 3)
    monkeypatch.setattr(sources.logger, "propagate", True)
    read_enwik8(DataArguments(dataset="enwik8", data_file=str(path)))
    assert "not the original enwik8" in caplog.text
    caplog.clear()
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(sources, "ENWIK8_SHA256", abc)
    read_enwik8(DataArguments(dataset="enwik8", data_file=str(path)))
    assert not caplog.text


def test_zip_of_several_files_is_an_error(tmp_path):
    path = tmp_path / "two.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "a")
        archive.writestr("b", "b")
    with pytest.raises(ValueError, match="holds 2 files"):
        read_text(DataArguments(dataset="text", data_file=str(path)))


@pytest.mark.parametrize(("dataset", "way_out"), [("enwik8", "--data_file"), ("wikitext103", "--data_dir")])
def test_without_a_connection_the_error_says_what_to_give(dataset, way_out):
    arguments = DataArguments(dataset=dataset, tokenizer="gpt2" if dataset == "wikitext103" else None)
    with pytest.raises(ValueError, match=way_out):
        sources.SOURCES[dataset](arguments)


WIKITEXT = {"train": " = Title = \n \n One two . \n", "valid": " \n Three @-@ four \n", "test": " Five \n \n"}


@pytest.mark.parametrize("suffix", ["raw", "tokens"])
def test_wikitext103_from_local_files(suffix, tmp_path):
    for name, text in WIKITEXT.items():
        (tmp_path / f"wiki.{name}.{suffix}").write_text(text)
    splits = read_wikitext103(DataArguments(dataset="wikitext103", tokenizer="gpt2", data_dir=str(tmp_path)))
    assert splits == {name: text.encode() for name, text in WIKITEXT.items()}


def test_wikitext103_from_the_hub_is_the_text_of_the_files(monkeypatch):
    def load_dataset(*name):
        assert name == ("Salesforce/wikitext", "wikitext-103-raw-v1")
        hub = {"train": WIKITEXT["train"], "validation": WIKITEXT["valid"], "test": WIKITEXT["test"]}
        # The hub's loading script kept lines with their ends, and emptied blank ones.
        rows = {name: [line if line.strip() else "" for line in text.splitlines(True)] for name, text in hub.items()}
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_dict({"text": lines}) for name, lines in rows.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = read_wikitext103(DataArguments(dataset="wikitext103", tokenizer="gpt2"))
    assert splits == {name: text.encode() for name, text in WIKITEXT.items()}


def test_wikitext103_with_a_file_missing_names_folder_and_files(tmp_path):
    (tmp_path / "wiki.train.raw").write_text("a")
    with pytest.raises(ValueError, match=r"wiki\.train\.raw, wiki\.valid\.raw and wiki\.test\.raw"):
        read_wikitext103(DataArguments(dataset="wikitext103", tokenizer="gpt2", data_dir=str(tmp_path)))


def test_stdlib_is_python_source_alike_in_all_splits_and_every_time():
    splits = read_stdlib(DataArguments(dataset="stdlib"))
    assert splits == read_stdlib(DataArguments(dataset="stdlib"))
    sizes = {name: len(split) for name, split in splits.items()}
    assert sizes["train"] > 5_000_000
    assert sizes["valid"] == pytest.approx(sizes["train"] / 18, rel=0.01)
    assert sizes["test"] == pytest.approx(sizes["train"] / 18, rel=0.01)
    for split in splits.values():
        assert split.count(b"\nimport ") > 10 and split.count(b"    def ") > 100


def test_stdlib_leaves_out_what_is_not_the_library(tmp_path, monkeypatch):
    for name in ("a.py", "pkg/b.py", "site-packages/c.py", "pkg/test/d.py", "_sysconfigdata__linux.py", "e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n" * 100)
    monkeypatch.setattr(sources.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    text = b"".join(read_stdlib(DataArguments(dataset="stdlib")).values()).decode()
    assert set(text.split()) == {"a.py", "pkg/b.py"}


def test_text_is_split_at_the_ends_of_lines(tmp_path):
    path = tmp_path / "text"
    text = "".join(f"Zeile {number} ä\n" for number in range(200)).encode()
    path.write_bytes(text)
    splits = read_text(DataArguments(dataset="text", data_file=str(path)))
    assert list(splits) == ["train", "valid", "test"]
    assert b"".join(splits.values()) == text
    assert all(split.endswith(b"\n") and split.decode().startswith("Zeile") for split in splits.values())
    assert len(splits["train"]) == pytest.approx(0.9 * len(text), abs=20)


def test_text_without_a_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="needs `data_file`"):
        read_text(DataArguments(dataset="text"))
    with pytest.raises(ValueError, match=r"absent` does not exist"):
        read_text(DataArguments(dataset="text", data_file=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("text", "split"), [(b"words " * 2000, "train"), (b"a line\r" * 500, "train"), (b"a\n" * 3, "valid")]
)
def test_text_without_enough_lines_is_an_error_that_says_so(text, split, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(text)
    count = text.count(b"\n")
    with pytest.raises(
        ValueError, match=rf"text` has .* and {count} ends of lines .* leaves nothing for the {split} split"
    ):
        read_text(DataArguments(dataset="text", data_file=str(path)))
    with pytest.raises(ValueError, match="is a folder"):
        read_text(DataArguments(dataset="text", data_file=str(tmp_path)))


def test_no_recipe_module_hides_another_package():
    """The folder is first on the path of a launched script, so a `tokenizers.py` in it would break transformers."""
    names = {path.stem for path in Path(sources.__file__).parent.glob("*.py")}
    assert not names & (set(sys.stdlib_module_names) | {"datasets", "evaluate", "tokenizers", "transformers", "torch"})
