"""Tokenizers: round trips, text8's rule, start tokens, and that the shipped files are what their script makes."""

import json
import lzma

import numpy as np
import pytest
import tokenizers as library

from flowlm import tokenizers
from flowlm.data import corpora, train_tokenizers
from flowlm.data.grammar import Grammar
from flowlm.tokenizers import Tokenizer

VOCAB_SIZES = {
    "chars": 28,
    "grammar98": 99,
    "sotu_bpe_512": 512,
    "sotu_bpe_1024": 1024,
    "sotu_bpe_4096": 4096,
    "sotu_letters_112": 112,
}


@pytest.fixture(scope="module")
def held_out_text():
    return next(corpora.documents("sotu", "test", ""))[1]


@pytest.mark.parametrize("name", [name for name in VOCAB_SIZES if name != "grammar98"])
@pytest.mark.parametrize("foreign", ["", " Na\u00efve \u20ac5 <|start|>\ttab 1984--and   more", "<|start|>"])
def test_round_trip(name, foreign, held_out_text):
    tokenizer = tokenizers.shipped(name)
    seen = tokenizer.normalise(held_out_text + foreign)
    ids = tokenizer.encode(held_out_text + foreign)
    assert tokenizer.decode(ids) == seen
    assert ids.dtype == np.int32
    assert tokenizer.start not in ids  # Not even where a document spells the start token.
    assert tokenizer.vocab_size == VOCAB_SIZES[name]


def test_grammar_words_round_trip():
    tokenizer, grammar = tokenizers.shipped("grammar98"), Grammar.load("grammar98")
    assert (tokenizer.vocab_size, tokenizer.start) == (99, 98)
    assert tokenizer.pieces[:98] == grammar.words
    for row in grammar.sample(np.random.default_rng(0), 50):
        sentence = " ".join(grammar.words[i] for i in row if i != grammar.pad)
        assert tokenizer.decode([98, *row]) == sentence
        np.testing.assert_array_equal(tokenizer.encode(sentence), row[row != grammar.pad])
    with pytest.raises(ValueError, match="zebra"):
        tokenizer.encode("the zebra")


def test_chars_follow_the_rule_of_text8():
    tokenizer = tokenizers.shipped("chars")
    assert tokenizer.normalise("  The 1st--of MAY, 1790!") == "the one st of may one seven nine zero"
    np.testing.assert_array_equal(tokenizer.encode("a Zb"), [0, 26, 25, 1])
    assert tokenizer.pieces == (*"abcdefghijklmnopqrstuvwxyz ", "<|start|>")


def test_decode_drops_start_tokens():
    tokenizer = tokenizers.shipped("sotu_bpe_512")
    ids = [tokenizer.start, *tokenizer.encode("one,"), tokenizer.start, *tokenizer.encode(" two")]
    assert tokenizer.decode(ids) == "one, two"
    assert tokenizer.decode_batch(np.array([ids, ids])) == ["one, two"] * 2


def test_shipped_files_are_what_the_script_makes():
    """Also that the BPE has seen the train split alone: retrained on that, it comes out to the byte."""
    speeches = [text for _, text in corpora.documents("sotu", "train", "")]
    made = {
        "chars": train_tokenizers.characters(),
        "grammar98": train_tokenizers.words(Grammar.load("grammar98")),
        "sotu_bpe_512": train_tokenizers.byte_level_bpe(speeches, 512),
        "sotu_letters_112": train_tokenizers.letter_bpe(speeches, 112),
    }
    for name, tokenizer in made.items():
        assert json.loads(tokenizer.to_str()) == json.loads(tokenizers.shipped(name).json), name


def test_save_and_load(tmp_path):
    tokenizer = tokenizers.shipped("sotu_bpe_512")
    tokenizer.save(tmp_path / "copy.json")
    copy = tokenizers.shipped(str(tmp_path / "copy.json"))
    assert copy == tokenizer
    assert copy.sha256 == tokenizer.sha256 != tokenizers.shipped("chars").sha256


def test_start_token_of_fetched_tokenizers(tmp_path):
    """[CLS] of BERT, <|endoftext|> of GPT-2, and neither the frame nor the truncation their files may ask for."""
    (tmp_path / "tokenizers").mkdir()
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "hello": 4, "wor": 5, "##ld": 6}
    bert = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    bert.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    bert.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    bert.decoder = library.decoders.WordPiece()
    bert.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    bert.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.enable_truncation(2)
    bert.save(str(tmp_path / "tokenizers" / "bert-base-uncased.json"))
    tokenizer = tokenizers.shipped("bert-base-uncased", tmp_path)
    assert tokenizer.start == 2
    np.testing.assert_array_equal(tokenizer.encode("Hello world"), [4, 5, 6])
    assert tokenizer.decode([2, 4, 5, 6, 3, 0]) == "hello world"

    gpt2 = library.Tokenizer(library.models.BPE({"a": 0}, []))
    gpt2.add_special_tokens(["<|endoftext|>"])
    gpt2.save(str(tmp_path / "tokenizers" / "gpt2.json"))
    assert tokenizers.shipped("gpt2", tmp_path).start == 1


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="known are chars, grammar98, sotu_bpe_1024.*bert-base-uncased"):
        tokenizers.shipped("sotu_bpe_2048")
    with pytest.raises(FileNotFoundError, match=r"from_pretrained\('openai-community/gpt2'\)\.save\(.*gpt2.json'\)"):
        tokenizers.shipped("gpt2", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        tokenizers.shipped(str(tmp_path / "nowhere.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="broken.json is not a file of the `tokenizers` library"):
        Tokenizer.load(tmp_path / "broken.json")
    library.Tokenizer(library.models.BPE({"a": 0}, [])).save(str(tmp_path / "startless.json"))
    with pytest.raises(ValueError, match="has no start token"):
        Tokenizer.load(tmp_path / "startless.json")


def test_damaged_corpus_is_refused(tmp_path, monkeypatch):
    lines = lzma.decompress(corpora.SOTU.read_bytes()).replace(b"Congress", b"Progress", 1)
    (tmp_path / "speeches.jsonl.xz").write_bytes(lzma.compress(lines, preset=0))
    monkeypatch.setattr(corpora, "SOTU", tmp_path / "speeches.jsonl.xz")
    with pytest.raises(ValueError, match="damaged"):
        next(corpora.documents("sotu", "train", ""))
