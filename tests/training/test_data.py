"""Documents to texts of equal length."""

import gzip

import pytest
import torch

from hf_diffusion.training import TokenTexts, load_text, train_tokenizer
from hf_diffusion.training.data import tokenize


TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer — élan\n" * 20


def test_plain_and_compressed_files_read_the_same(tmp_path):
    plain, packed = tmp_path / "text.txt", tmp_path / "text.txt.gz"
    plain.write_text(TEXT, encoding="utf-8")
    packed.write_bytes(gzip.compress(TEXT.encode()))
    assert load_text(str(plain)) == load_text(str(packed)) == [TEXT]


def test_missing_and_empty_files_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in (("missing.txt", "is not a file"), ("empty.txt", "holds no text")):
        with pytest.raises(ValueError, match=message):
            load_text(str(tmp_path / name))


def test_tokenizer_is_lossless_and_keeps_the_mask_outside_the_vocabulary():
    tokenizer = train_tokenizer([TEXT], 300)
    assert len(tokenizer) == 301
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (299, 300)
    ids = tokenize([TEXT, "x"], tokenizer)
    assert tokenizer.decode(ids[:-1]).replace(tokenizer.eos_token, "") == TEXT + "x"
    assert int((ids == 299).sum()) == 2


def test_special_tokens_spelled_out_in_a_text_are_text():
    tokenizer = train_tokenizer([TEXT], 300)
    ids = tokenize(["a<|mask|>b<|endoftext|>"], tokenizer)
    assert tokenizer.mask_token_id not in ids
    assert int((ids == tokenizer.eos_token_id).sum()) == 1


def test_texts_follow_each_other_without_overlap():
    texts = TokenTexts(torch.arange(10), 4)
    assert [text["input_ids"].tolist() for text in texts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert TokenTexts(torch.arange(10), 4, torch.arange(4).flip(0))[0]["block_index"].tolist() == [3, 2, 1, 0]
    with pytest.raises(ValueError, match="fewer than one text"):
        TokenTexts(torch.arange(3), 4)
