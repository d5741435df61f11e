"""Files of the `tokenizers` library, which are written for other uses: what is set aside, and what must hold.

Rows are cut and framed here and must be the same whenever they are made, so a file's truncation, padding, dropout and
post-processor are not used. Control tokens (start, pad, mask, every special one) never stand for text, whatever the file says.
"""

import json

import tokenizers
from etils import epath

START_TOKENS = ("<|start|>", "[CLS]", "<|endoftext|>")
PAD = "[PAD]"
# A file may hold these without calling them special; the library would then find them in a text.
_CONTROL = (*START_TOKENS, PAD, "[SEP]", "[MASK]")
# No text spells it, because it is longer than a character and U+FDD0 is none.
_LOST = "\ufdd0lost"


def read_tokenizer(path: epath.Path) -> str:
    """The text of a tokenizer file that keeps its promises.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a tokenizer, has none of the start tokens, or its ids are not 0, 1, ... each once.
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
    """The first of START_TOKENS that is in the vocabulary."""
    return next((token for token in START_TOKENS if model.token_to_id(token) is not None), None)


def settled(text: str) -> tokenizers.Tokenizer:
    """The tokenizer of a file, without what is set aside; "<|start|>" written in a document is text, not a start token."""
    return _from(json.loads(text))


def noticing(text: str) -> tuple[tokenizers.Tokenizer, int]:
    """`settled`, and the id that it gives to what the vocabulary cannot spell.

    A BPE model without an unknown token drops such characters in silence. Here it gives each one an id behind the last.
    """
    file = json.loads(text)
    kind = file["model"]
    if kind["type"] == "BPE" and kind.get("unk_token") is None:
        # With the added tokens, which would else be numbered anew behind it.
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
