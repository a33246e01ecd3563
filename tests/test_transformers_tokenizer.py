"""A tokenizer that is trained here opens in `transformers`, and gives the same tokens and the same text."""

from pathlib import Path

import pytest
from tokenizer_cases import CORPUS, like_llama2, like_llama3, trained

from lss_jax.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.transformers

TEXTS = (CORPUS, " x\n\ny  z\t", "Zoë 日本語 \U0001f600 \x00", "one<|endoftext|>two", "12345678")


def test_a_folder_of_ours_opens_and_gives_the_same_tokens(tmp_path):
    import transformers

    ours = load_tokenizer(trained(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token, theirs.eos_token_id) == (ours.vocab, "<|endoftext|>", ours.end)
    for text in TEXTS:
        tokens = ours.tokens_of(text.encode()).tolist()
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == (
            b"".join(map(ours.bytes_of, tokens)).decode()
        )


@pytest.mark.parametrize("make", [like_llama2, like_llama3])
def test_a_folder_of_theirs_gives_the_same_tokens(tmp_path, make):
    import transformers

    path = make(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path, eos_token=load_tokenizer(path).end_text)
    theirs.save_pretrained(tmp_path / "saved")
    ours = load_tokenizer(str(Path(tmp_path) / "saved" / "tokenizer.json"))
    assert (ours.end, ours.end_text) == (theirs.eos_token_id, theirs.eos_token)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.tokens_of(text.encode()).tolist()
