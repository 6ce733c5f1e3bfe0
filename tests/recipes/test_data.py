import lzma
from pathlib import Path

import data
import numpy as np
import pytest
from arguments import DataArguments
from data import cap_text, count_words, encode_lines, load_corpus, save_atomically
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
TEXT = "".join(f"Line {number} of the text, with ä.\n" for number in range(500)).encode()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A small byte-level BPE tokenizer with an end-of-text token, of more than 256 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT.decode(), "hello world"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return str(folder)


def test_byte_corpus(text_file, tmp_path):
    corpus = load_corpus(DataArguments(dataset="text", data_file=text_file, cache_dir=str(tmp_path / "cache")))
    assert b"".join(corpus.splits[name].tokens.tobytes() for name in ("train", "valid", "test")) == TEXT
    assert corpus.start_token == ord("\n")
    assert len(corpus.tokenizer) == 256
    for split in corpus.splits.values():
        assert split.tokens.dtype == np.uint8 and isinstance(split.tokens, np.memmap)
        assert split.num_bytes == len(split.tokens)
    words = {name: split.num_words for name, split in corpus.splits.items()}
    assert words["train"] is None
    assert words["valid"] == len(corpus.splits["valid"].tokens.tobytes().split(b"\n")[:-1]) * 8


def test_tokenizer_corpus(text_file, tokenizer_folder, tmp_path):
    arguments = DataArguments(
        dataset="text", data_file=text_file, tokenizer=tokenizer_folder, cache_dir=str(tmp_path / "cache")
    )
    corpus = load_corpus(arguments)
    decoded = [corpus.tokenizer.decode(corpus.splits[name].tokens) for name in ("train", "valid", "test")]
    assert "".join(decoded).encode() == TEXT
    assert corpus.splits["train"].tokens.dtype == np.uint16
    assert len(corpus.splits["train"].tokens) < corpus.splits["train"].num_bytes
    assert corpus.start_token == corpus.tokenizer.eos_token_id


def test_text_in_another_encoding_is_named_where_a_tokenizer_reads_it(tokenizer_folder, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café au lait\n".encode("latin-1") * 100)
    settings = {"dataset": "text", "data_file": str(path), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"The train split of `.*latin.txt` is not UTF-8.*at byte 3\)"):
        load_corpus(DataArguments(**settings, tokenizer=tokenizer_folder))
    assert sum(split.num_bytes for split in load_corpus(DataArguments(**settings)).splits.values()) == 1300


def test_cache_is_used_and_follows_text_and_tokenizer(text_file, tokenizer_folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    settings = {"dataset": "text", "cache_dir": str(cache)}
    saved = []
    monkeypatch.setattr(
        data, "save_atomically", lambda path, tokens: (saved.append(path), save_atomically(path, tokens))
    )
    first = load_corpus(DataArguments(data_file=text_file, **settings))
    assert len(saved) == 3 and sorted(cache.iterdir()) == sorted(saved)
    again = load_corpus(DataArguments(data_file=text_file, **settings))
    assert len(saved) == 3
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.splits["train"].tokens, first.splits["train"].tokens)

    other_tokenizer = load_corpus(DataArguments(data_file=text_file, tokenizer=tokenizer_folder, **settings))
    assert len(saved) == 6
    Path(text_file).write_bytes(TEXT.replace(b"Line 499 ", b"Zeile 499 "))
    other_text = load_corpus(DataArguments(data_file=text_file, **settings))
    assert len({first.fingerprint, other_tokenizer.fingerprint, other_text.fingerprint}) == 3
    assert b"Zeile" in other_text.splits["test"].tokens.tobytes()


def test_caps_take_the_beginning_of_each_split(text_file, tmp_path):
    settings = {"dataset": "text", "data_file": text_file, "cache_dir": str(tmp_path / "cache")}
    whole = load_corpus(DataArguments(**settings)).splits
    capped = load_corpus(DataArguments(max_train_bytes=1000, max_eval_bytes=101, **settings)).splits
    assert {name: split.num_bytes for name, split in capped.items()} == {"train": 1000, "valid": 101, "test": 101}
    for name, split in capped.items():
        assert np.array_equal(split.tokens, whole[name].tokens[: split.num_bytes])


@given(st.binary(max_size=60), st.integers(1, 60))
def test_cap_text(text, cap):
    assert cap_text(text, None, at_line_end=True) == text
    assert cap_text(text, cap, at_line_end=False) == text[:cap]
    lines = cap_text(text, cap, at_line_end=True)
    assert text.startswith(lines) and len(lines) <= cap
    assert lines == text or b"\n" not in text[len(lines) : cap]


def test_tokens_take_the_smallest_type(monkeypatch):
    class FakeTokenizer:
        def __len__(self):
            return self.size

        def __call__(self, lines, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [[self.size - 1] * len(line) for line in lines]}

    tokenizer = FakeTokenizer()
    for tokenizer.size, dtype in ((256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)):
        tokens = encode_lines(b"ab\nc\n", tokenizer)
        assert tokens.dtype == dtype
        assert tokens.tolist() == [tokenizer.size - 1] * 5


def test_many_lines_are_the_same_in_pieces(tokenizer_folder, monkeypatch):
    tokenizer = data.load_tokenizer(tokenizer_folder)
    at_once = encode_lines(TEXT, tokenizer)
    monkeypatch.setattr(data, "LINES_PER_CALL", 7)
    assert np.array_equal(encode_lines(TEXT, tokenizer), at_once)


def test_words_are_counted_by_hand():
    assert count_words(b" = Title = \n \n One two ,\tthree \n") == 3 + 1 + 1 + 4 + 1


@pytest.mark.parametrize("form", ["raw", "tokens"])
@pytest.mark.parametrize(("split", "words"), [("valid", 217_646), ("test", 245_569)])
def test_words_of_the_real_wikitext(split, words, form):
    path = SHARED / "wikitext2" / f"wiki.{split}.{form}.xz"
    if not path.is_file():
        pytest.skip("the WikiText files are not here")
    assert count_words(lzma.decompress(path.read_bytes())) == words


def test_interrupted_write_leaves_no_cache_file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "tokens.npy"

    def fail(file, tokens):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_atomically(path, np.zeros(3))
    assert list(path.parent.iterdir()) == []
