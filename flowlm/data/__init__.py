"""Data: corpora, packing to rows, grammars. `open_dataset` is all that the rooms above need."""

from flowlm.data.dataset import Dataset, Split, open_dataset

__all__ = ["Dataset", "Split", "open_dataset"]
