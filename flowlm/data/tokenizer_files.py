"""Reads files of the `tokenizers` library: which parts of a file are ignored, and what a file must promise.

A file's truncation, padding, dropout and post-processor are ignored, because packing.py cuts and frames rows itself, and the same
text must always give the same rows. No text is encoded as a control token (start, pad, mask, every special one), whatever the
file says.
"""

import json

import tokenizers
from etils import epath

START_TOKENS = ("<|start|>", "[CLS]", "<|endoftext|>")
PAD = "[PAD]"
# A file may hold these without calling them special. The library would then encode their spelling in a text as them.
_CONTROL = (*START_TOKENS, PAD, "[SEP]", "[MASK]")
# No text spells this token, because U+FDD0 is no character and no merge makes the token.
_LOST = "\ufdd0lost"


def read_tokenizer(path: epath.Path) -> str:
    """The text of a tokenizer file, after checks of what the file must promise.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a tokenizer, has none of the start tokens, or its ids are not 0, 1, ... each once.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {path}; name a file written by Tokenizer.save")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is binary, not a JSON file of the `tokenizers` library. A SentencePiece model becomes one by "
            "`transformers.AutoTokenizer.from_pretrained(ITS_FOLDER).save_pretrained(DIR)`, as DIR/tokenizer.json"
        ) from error
    try:
        model = settled(text)
    except Exception as error:  # The library raises bare Exception for every malformed file.
        raise ValueError(f"{path} is not a file of the `tokenizers` library: {error}") from error
    if start_token(model) is None:
        raise ValueError(f"{path} has no start token; its vocabulary must hold one of {START_TOKENS}")
    ids = sorted(model.get_vocab(with_added_tokens=True).values())
    wrong = next((i for i, found in enumerate(ids) if i != found), None)
    if wrong is not None:
        raise ValueError(
            f"{path} has {len(ids)} tokens, and of id {wrong} not one: number them 0 to {len(ids) - 1}, each once"
        )
    return text


def start_token(model: tokenizers.Tokenizer) -> str | None:
    """The first of START_TOKENS that is in the vocabulary, or None."""
    return next((token for token in START_TOKENS if model.token_to_id(token) is not None), None)


def settled(text: str) -> tokenizers.Tokenizer:
    """The tokenizer of a file without its ignored parts. It reads "<|start|>" in a document as text, not as a start token."""
    return _from(json.loads(text))


def noticing(text: str) -> tuple[tokenizers.Tokenizer, int]:
    """(the tokenizer of `settled`, the id that it gives to what the vocabulary cannot spell, or -1 if it gives none).

    A BPE model without an unknown token drops characters that it cannot spell in silence. Here each such character gets a new id,
    the vocabulary's size.
    """
    file = json.loads(text)
    kind = file["model"]
    if kind["type"] == "BPE" and kind.get("unk_token") is None:
        # The added tokens are included because the library would otherwise number them anew, behind the new id.
        vocabulary = settled(text).get_vocab(with_added_tokens=True)
        size = len(vocabulary)
        file["model"] = kind | {"unk_token": _LOST, "fuse_unk": False, "vocab": vocabulary | {_LOST: size}}
        return _from(file), size
    model = _from(file)
    unknown = kind.get("unk_id") if kind["type"] == "Unigram" else model.token_to_id(kind["unk_token"])
    return model, -1 if unknown is None else unknown


def _from(file: dict) -> tokenizers.Tokenizer:
    file = file | {"truncation": None, "padding": None, "post_processor": None}
    if "dropout" in file.get("model", {}):
        file["model"] = file["model"] | {"dropout": None}
    model = tokenizers.Tokenizer.from_str(json.dumps(file))
    model.encode_special_tokens = True
    model.add_special_tokens([token for token in _CONTROL if model.token_to_id(token) is not None])
    return model
