"""
Where the text comes from. Every function takes the [`DataArguments`] and returns three byte strings, the
train, valid and test split, the same ones on every machine and in every run.
"""

import hashlib
import random
import sysconfig
import zipfile
from pathlib import Path

import datasets
from arguments import DataArguments
from transformers.utils import logging


logger = logging.get_logger("recipes.sources")

SPLIT_NAMES = ("train", "valid", "test")
NEWLINE = b"\n"

ENWIK8_URL = "https://mattmahoney.net/dc/enwik8.zip"
ENWIK8_BYTES = 100_000_000
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
ENWIK8_SPLIT = (90_000_000, 95_000_000)  # train ends, valid ends: the split of all published numbers

# Large or generated per machine, and of no use as text.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
STDLIB_ORDER_SEED = 0


def read_enwik8(args: DataArguments) -> dict[str, bytes]:
    """
    enwik8, from `data_file` (the file itself or a zip of it) or else downloaded.

    Raises:
        `ValueError`: If the size is not that of enwik8, or if there is neither a file nor a connection.
    """
    path = Path(args.data_file or _download_enwik8())
    data = _read_zipped_or_raw(path)
    if len(data) != ENWIK8_BYTES:
        raise ValueError(
            f"`{path}` has {len(data):,} bytes, but enwik8 has exactly {ENWIK8_BYTES:,}. Fetch {ENWIK8_URL} again and "
            "give it, or the file in it, as `--data_file`; for other text use `--dataset text`."
        )
    if hashlib.sha256(data).hexdigest() != ENWIK8_SHA256:
        logger.warning(f"`{path}` is not the original enwik8: do not compare its numbers with published ones.")
    return _split_at(data, *ENWIK8_SPLIT)


def read_wikitext103(args: DataArguments) -> dict[str, bytes]:
    """
    WikiText-103, from `wiki.{train,valid,test}.raw` or `.tokens` in `data_dir`, or else the raw version from the hub.

    Raises:
        `ValueError`: If `data_dir` does not hold the three files, or if it is not given and the hub out of reach.
    """
    if args.data_dir is None:
        return _load_wikitext103_from_hub()
    folder = Path(args.data_dir)
    for suffix in ("raw", "tokens"):
        paths = [folder / f"wiki.{name}.{suffix}" for name in SPLIT_NAMES]
        if all(path.is_file() for path in paths):
            return {name: path.read_bytes() for name, path in zip(SPLIT_NAMES, paths, strict=True)}
    raise ValueError(
        f"`--data_dir {folder}` does not hold the three files wiki.train.raw, wiki.valid.raw and wiki.test.raw (nor "
        "the same with .tokens). Unpack them there, or leave `data_dir` out to load WikiText-103 from the hub."
    )


def read_stdlib(args: DataArguments) -> dict[str, bytes]:
    """
    The Python sources of the standard library that runs this, which every machine has.

    It differs between Python versions, so compare numbers only within one.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not STDLIB_EXCLUDED.intersection(path.relative_to(root).parts)]
    # `_sysconfigdata*.py` records how this one interpreter was built.
    paths = sorted(path for path in paths if not path.name.startswith("_sysconfigdata"))
    if not paths:
        raise ValueError(f"There are no Python sources in {root}. Use `--dataset text --data_file FILE` instead.")
    # Shuffled by file, so that all three splits hold the same kind of text.
    random.Random(STDLIB_ORDER_SEED).shuffle(paths)
    return _split_by_share(b"\n".join(path.read_bytes() for path in paths))


def read_text(args: DataArguments) -> dict[str, bytes]:
    """
    Any local file, `data_file`: the first 90% of it to train, then 5% to validate and 5% to test.

    Raises:
        `ValueError`: If there is no `data_file`, or if its lines are too few or too long to make three splits of.
    """
    if args.data_file is None:
        raise ValueError("`dataset: text` needs `data_file`, the file to read.")
    data = _read_zipped_or_raw(Path(args.data_file))
    splits = _split_by_share(data)
    empty = [name for name, text in splits.items() if not text]
    if empty:
        raise ValueError(
            f"`--data_file {args.data_file}` has {len(data):,} bytes and {data.count(NEWLINE):,} ends of lines (\\n). "
            f"It is cut at these into 90%, 5% and 5%, which leaves nothing for the {empty[0]} split. Give more text, "
            "or the same in shorter lines."
        )
    return splits


def _download_enwik8() -> str:
    try:
        return datasets.DownloadManager().download(ENWIK8_URL)
    except OSError as error:
        raise ValueError(
            f"enwik8 could not be fetched ({type(error).__name__}). Fetch {ENWIK8_URL} elsewhere and give it as "
            "`--data_file`."
        ) from error


def _load_wikitext103_from_hub() -> dict[str, bytes]:
    try:
        loaded = datasets.load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1")
    except OSError as error:
        raise ValueError(
            f"WikiText-103 could not be loaded from the hub ({type(error).__name__}). Unpack wiki.train.raw, "
            "wiki.valid.raw and wiki.test.raw in a folder and give it as `--data_dir`."
        ) from error
    hub_names = {"train": "train", "valid": "validation", "test": "test"}
    # The hub's rows are lines, but those that hold only a space were emptied.
    return {name: "".join(line or " \n" for line in loaded[hub_names[name]]["text"]).encode() for name in SPLIT_NAMES}


def _read_zipped_or_raw(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"`--data_file {path}` " + ("is a folder." if path.is_dir() else "does not exist."))
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise ValueError(f"`{path}` holds {len(members)} files instead of one. Unpack it and give the file.")
        return archive.read(members[0])


def _split_by_share(data: bytes) -> dict[str, bytes]:
    """90%, 5% and 5%, cut at the ends of lines, so that no character is torn apart."""
    ends = [data.rfind(NEWLINE, 0, len(data) * percent // 100) + 1 for percent in (90, 95)]
    return _split_at(data, *ends)


def _split_at(data: bytes, train_end: int, valid_end: int) -> dict[str, bytes]:
    return {"train": data[:train_end], "valid": data[train_end:valid_end], "test": data[valid_end:]}


SOURCES = {"enwik8": read_enwik8, "wikitext103": read_wikitext103, "stdlib": read_stdlib, "text": read_text}
