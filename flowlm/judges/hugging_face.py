"""Any causal language model of Hugging Face as a judge, by name or local path; most papers use gpt2-large."""

from typing import Any

import numpy as np

from flowlm.judges.language_model import Encode, LanguageModel, States


def load_language_model(name: str, length: int) -> tuple[str, Encode, Any, int]:
    """(label in the metrics, encode: texts -> lists of ids, model, id of end-of-text) of the model NAME, without a download.

    Raises:
      ImportError: the extra `hf` is not installed.
      FileNotFoundError: the model is neither a path nor in the local cache.
      ValueError: the model cannot read `length` tokens, or has no end-of-text token, from which a text is read.
    """
    try:
        import torch  # noqa: F401  transformers can be imported without it
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"the judge hf:{name} needs transformers and torch: pip install -e .[hf]") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True).eval()
    except OSError as error:
        raise FileNotFoundError(
            f"the judge {name!r} is not here: fetch it with `hf download {name}`, or give its path"
        ) from error
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and limit < length:
        raise ValueError(f"the judge {name!r} reads {limit} tokens at most, and rows here have {length}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the judge {name!r} has no end-of-text token")

    def encode(texts):
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    label = name.rstrip("/").rpartition("/")[2].replace("-", "_")
    return label, encode, model, tokenizer.eos_token_id


def make_judge(name: str, length: int) -> LanguageModel:
    """The judge NAME, which reads the first `length` tokens of every text. Raises what `load_language_model` raises."""
    label, encode, model, end = load_language_model(name, length)
    import torch

    def nats(ids: np.ndarray) -> np.ndarray:
        ids = torch.as_tensor(ids, dtype=torch.long)
        with torch.no_grad():
            log_p = model(ids[:, :-1]).logits.float().log_softmax(-1)
        return -log_p.gather(-1, ids[:, 1:, None])[..., 0].numpy()

    return LanguageModel(label, encode, nats, end, length)


def reader(name: str, length: int) -> tuple[str, Encode, States, int]:
    """(label, encode, states, end) of NAME for `mauve.last_states`; the states are those before the output layer.

    Raises what `load_language_model` raises.
    """
    label, encode, model, end = load_language_model(name, length)
    import torch

    def states(ids: np.ndarray, last: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            hidden = model.base_model(torch.as_tensor(ids, dtype=torch.long)).last_hidden_state
        return hidden[torch.arange(len(ids)), torch.as_tensor(last, dtype=torch.long)].float().numpy()

    return label, encode, states, end
