"""Tokenizers: round trips, text8's rule, start tokens, and that the shipped files are what their script makes."""

import json
import lzma

import numpy as np
import pytest
import tokenizers as library

from flowlm.data import corpora, tokenizers, train_tokenizers, windows
from flowlm.data.grammar import Grammar, shipped_names
from flowlm.data.tokenizers import Tokenizer

VOCAB_SIZES = {
    "chars": 28,
    "grammar98": 99,
    "grammar1k": 1377,
    "sotu_bpe_512": 512,
    "sotu_bpe_1024": 1024,
    "sotu_bpe_4096": 4096,
    "sotu_letters_112": 112,
}


@pytest.fixture(scope="module")
def held_out_text():
    return next(corpora.documents("sotu", "test", ""))[1]


@pytest.mark.parametrize("name", [name for name in VOCAB_SIZES if name not in shipped_names()])
@pytest.mark.parametrize("foreign", ["", " Na\u00efve \u20ac5 <|start|>\ttab 1984--and   more", "<|start|>"])
def test_round_trip(name, foreign, held_out_text):
    tokenizer = tokenizers.shipped(name)
    seen = tokenizer.normalise(held_out_text + foreign)
    ids = tokenizer.encode(held_out_text + foreign)
    assert tokenizer.decode(ids) == seen
    assert ids.dtype == np.int32
    assert tokenizer.start not in ids  # Not even where a document spells the start token.
    assert tokenizer.vocab_size == VOCAB_SIZES[name]


@pytest.mark.parametrize("name", shipped_names())
def test_grammar_words_round_trip(name):
    tokenizer, grammar = tokenizers.shipped(name), Grammar.load(name)
    start = len(grammar.words)
    assert (tokenizer.vocab_size, tokenizer.start) == (VOCAB_SIZES[name], start)
    assert tokenizer.pieces[:start] == grammar.words
    for row in grammar.sample(np.random.default_rng(0), 50):
        sentence = " ".join(grammar.words[i] for i in row if i != grammar.pad)
        assert tokenizer.decode([start, *row]) == sentence
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
        **{name: train_tokenizers.words(Grammar.load(name)) for name in shipped_names()},
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
    with pytest.raises(ValueError, match="known are chars, .*grammar98, .*sotu_bpe_1024.*bert-base-uncased"):
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


# --- what a file may promise and not keep ------------------------------------------------------------------------


def bpe(letters, merges=(), **kind):
    """BPE of single letters, as <|start|> behind them."""
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    model = library.Tokenizer(library.models.BPE(vocabulary, list(merges), **kind))
    model.add_special_tokens(["<|start|>"])
    return model


def loaded(model, tmp_path):
    model.save(str(tmp_path / "made.json"))
    return Tokenizer.load(tmp_path / "made.json")


def test_characters_that_bpe_drops_are_counted_and_named(tmp_path):
    tokenizer = loaded(bpe("acf", [("a", "c")]), tmp_path)
    ids, counts = tokenizer.encode_counted(["caf\u00e9 \u00e9", "caf", "a\u00e9c"])
    assert [row.tolist() for row in ids] == [[1, 0, 2], [1, 0, 2], [3]]  # as the library has them
    assert counts == [3, 0, 1]
    assert tokenizer.unspelled("caf\u00e9 \u00e9") == ["\u00e9", " "]
    assert tokenizer.vocab_size == 5 and max(map(max, ids)) < 5


def test_unknown_words_are_counted_and_named(tmp_path):
    pieces = library.models.WordPiece({"[UNK]": 0, "[CLS]": 1, "on": 2, "##e": 3}, unk_token="[UNK]")
    model = library.Tokenizer(pieces)
    model.pre_tokenizer = library.pre_tokenizers.Whitespace()
    model.add_special_tokens(["[UNK]", "[CLS]"])
    tokenizer = loaded(model, tmp_path)
    ids, counts = tokenizer.encode_counted(["one two on three"])
    assert ids[0].tolist() == [2, 3, 0, 2, 0] and counts == [2]
    assert tokenizer.unspelled("one two on three") == ["two", "three"]


def byte_bpe(special):
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    model = library.Tokenizer(library.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    model.add_tokens([library.AddedToken(token, special=special) for token in ("<|start|>", "[MASK]")])
    return model


def unigram(special):
    pieces = [
        ("<unk>", 0.0),
        ("<|start|>", 0.0),
        ("[MASK]", 0.0),
        *((c, -5.0) for c in dict.fromkeys("\u2581<|start>[MASK]b")),
    ]
    model = library.Tokenizer(library.models.Unigram(pieces, 0, False))
    model.decoder = library.decoders.Fuse()
    if special is not None:
        model.add_tokens([library.AddedToken(token, special=special) for token in ("<|start|>", "[MASK]")])
    return model


@pytest.mark.parametrize("make", [byte_bpe, unigram])
@pytest.mark.parametrize("special", [False, True])
def test_no_text_forges_a_control_token(tmp_path, make, special):
    """Whether the file calls it special or not, and also where the model itself has it among its pieces."""
    tokenizer = loaded(make(special), tmp_path)
    mask = tokenizer.pieces.index("[MASK]")
    for text in ("a<|start|>b[MASK]", "<|start|>"):
        (ids,), counts = tokenizer.encode_counted([text])
        assert not {tokenizer.start, mask} & {*ids.tolist()}
        assert counts == [0] and tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.start, *tokenizer.encode("ab"), mask]) == "ab"


def test_a_token_that_is_only_in_the_model_is_not_forged(tmp_path):
    tokenizer = loaded(unigram(None), tmp_path)
    assert tokenizer.start not in tokenizer.encode("b<|start|>")
    words = library.Tokenizer(library.models.WordLevel({"[CLS]": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    assert loaded(words, tmp_path).encode("a [CLS]").tolist() == [1, 2, 2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"reads text as its token '<\|start\|>'"):
        tokenizers.numbers(4).encode("1 two")


def test_dropout_padding_truncation_and_templates_of_a_file_are_set_aside(tmp_path):
    model = bpe("ab", [("a", "b")], dropout=0.5)
    model.post_processor = library.processors.TemplateProcessing(
        single="$A $A <|start|>", special_tokens=[("<|start|>", 3)]
    )
    model.enable_truncation(3)
    model.enable_padding(length=9)
    tokenizer = loaded(model, tmp_path)
    assert all(tokenizer.encode("abababab").tolist() == [2, 2, 2, 2] for _ in range(20))


def test_ids_with_a_hole_or_twice_given_are_refused(tmp_path):
    for vocabulary, wrong in (({"a": 0, "b": 3}, 1), ({"a": 0, "b": 2}, 1)):  # <|start|> becomes 2
        model = library.Tokenizer(library.models.BPE(vocabulary, []))
        model.add_special_tokens(["<|start|>"])
        with pytest.raises(ValueError, match=rf"made.json has 3 tokens, and of id {wrong} not one: number them 0 to 2"):
            loaded(model, tmp_path)


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_a_sentencepiece_file_is_told_how_to_be_converted(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02\x12\xff\xfe\xe2\x96\x81")
    with pytest.raises(
        ValueError, match="is binary, .*A SentencePiece model becomes one by `transformers.*tokenizer.json"
    ):
        tokenizers.shipped(str(tmp_path / name))


# --- long texts --------------------------------------------------------------------------------------------------


class Spy:
    """A model that remembers how many characters it was handed at once."""

    def __init__(self, model):
        self._model, self.most = model, 0

    def __getattr__(self, name):
        def call(texts, **arguments):
            self.most = max(self.most, len(texts) if isinstance(texts, str) else sum(map(len, texts)))
            return getattr(self._model, name)(texts, **arguments)

        return call


@pytest.mark.parametrize("name", [name for name in VOCAB_SIZES if name not in shipped_names()])
def test_a_long_text_is_read_in_windows_and_comes_out_the_same(name, held_out_text, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 3000)
    monkeypatch.setattr(windows, "CONTEXT", 200)
    text = "\n\n".join([held_out_text * 8, "\u4e2d\u6587\U0001f600e\u0301" * 2000, " " * 150, held_out_text[:9000]])
    model = tokenizers.shipped(name)._model
    spy = Spy(model)
    (ids,) = windows.encode(spy, [text])
    np.testing.assert_array_equal(ids, model.encode(text, add_special_tokens=False).ids)
    assert spy.most < 4 * (3000 + 4 * 200) < len(text) / 5


def test_a_text_that_cannot_be_cut_is_read_whole(monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 2000)
    monkeypatch.setattr(windows, "CONTEXT", 201)
    merges = [("a" * 2**i, "a" * 2**i) for i in range(5)]
    model, text = bpe("a", merges), "a" * 9999
    np.testing.assert_array_equal(windows.encode(model, [text])[0], model.encode(text).ids)
