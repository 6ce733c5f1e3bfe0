import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabulary import byte_tokenizer, load_tokenizer, start_token_of


BYTES = byte_tokenizer()


@given(st.text())
def test_byte_tokens_are_the_bytes(text):
    ids = BYTES(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_is_found_beside_a_saved_model(tmp_path):
    BYTES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 256
    assert bytes(loaded("ä b\n")["input_ids"]) == "ä b\n".encode()


def test_empty_tokenizer_is_an_error_that_names_the_folder(tmp_path):
    # What transformers 5 makes of this is a tokenizer of one token, without a word.
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    with pytest.raises(ValueError, match=rf"{tmp_path.name}` is empty.*reads 'hello world' as.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def save_word_tokenizer(folder, vocabulary, **special):
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", **special).save_pretrained(folder)
    return str(folder)


def test_tokenizer_that_knows_no_word_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        load_tokenizer(save_word_tokenizer(tmp_path, ["?", "Kuchen"]))


def test_tokenizer_that_knows_a_word_is_not_empty(tmp_path):
    tokenizer = load_tokenizer(save_word_tokenizer(tmp_path, ["?", "hello"]))
    assert tokenizer("hello Kuchen")["input_ids"] == [1, 0]


def test_start_token_is_end_of_text_or_else_its_beginning(tmp_path):
    both = save_word_tokenizer(tmp_path / "both", ["?", "hello", "<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    assert start_token_of(load_tokenizer(both)) == 3
    one = save_word_tokenizer(tmp_path / "one", ["?", "hello", "<s>"], bos_token="<s>")
    assert start_token_of(load_tokenizer(one)) == 2
    with pytest.raises(ValueError, match="neither an end-of-text nor a beginning-of-text"):
        start_token_of(load_tokenizer(save_word_tokenizer(tmp_path / "none", ["?", "hello"])))
