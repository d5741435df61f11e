"""Data: corpora, packing to rows, grammars, and `open_dataset`, which is all that the floors above need."""

from flowlm.data.dataset import Dataset, Split, open_dataset

__all__ = ["Dataset", "Split", "open_dataset"]
