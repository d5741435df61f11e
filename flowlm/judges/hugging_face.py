"""Any causal language model of Hugging Face as a judge, by name or local path; the field's default is gpt2-large."""

import numpy as np

from flowlm.judges.language_model import LanguageModel


def make_judge(name: str, length: int) -> LanguageModel:
    """The judge NAME, which reads `length` of its tokens of every text. It is never downloaded here.

    Raises:
      ImportError: the extra is not installed. FileNotFoundError: the model is neither a path nor in the local cache.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"the judge hf:{name} needs transformers and torch: pip install 'flowlm[hf]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True).eval()
    except OSError as error:
        raise FileNotFoundError(
            f"the judge {name!r} is not here: fetch it with `hf download {name}`, or give its path"
        ) from error

    def nats(ids: np.ndarray) -> np.ndarray:
        ids = torch.as_tensor(ids, dtype=torch.long)
        with torch.no_grad():
            log_p = model(ids[:, :-1]).logits.float().log_softmax(-1)
        return -log_p.gather(-1, ids[:, 1:, None])[..., 0].numpy()

    encode = lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    label = name.rstrip("/").rpartition("/")[2].replace("-", "_")
    return LanguageModel(label, encode, nats, tokenizer.eos_token_id, length)
