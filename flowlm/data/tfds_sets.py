"""Sets that TensorFlow Datasets prepared (https://www.tensorflow.org/datasets), such as lm1b. Nothing is downloaded or prepared."""

import os
import re

import tensorflow_datasets as tfds
from etils import epath

from flowlm.system import storage

_MEND = "`tfds build NAME --file_format=array_record` makes one"


def files(place: str) -> tuple[epath.Path, list[epath.Path], list[epath.Path]]:
    """(folder of a set, its files of records, no others).

    Args:
      place: the set's folder, or its name as tfds writes it, such as lm1b or lm1b:1.1.0, which is looked for where tfds prepares
        sets; with :SPLIT behind it for the files of one split alone.

    Raises:
      FileNotFoundError: there is no such set.
      ValueError: there is no such split, or its files can be read by TensorFlow alone.
    """
    name, split = re.fullmatch(r"(.*?)(?::([A-Za-z_]\w*))?", place).groups()
    builder = _opened(name)
    known = sorted(builder.info.splits)
    if split and split not in known:
        raise ValueError(
            f"--source=tfds:{place}: there is no split {split!r} in {builder.data_path}, which has {known}"
        )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        written = builder.info.file_format.value
        raise ValueError(f"--source=tfds:{place}: {builder.data_path} is in {written}, not array_record: {_MEND}")
    taken = [file for each in known if split in (None, each) for file in builder.info.splits[each].filepaths]
    return epath.Path(builder.data_path), [*map(epath.Path, taken)], []


def _opened(name: str) -> tfds.core.DatasetBuilder:
    folder = storage.path(name)
    if (folder / "dataset_info.json").exists():
        return tfds.builder_from_directory(os.fspath(folder))
    try:
        return tfds.core.read_only_builder.builder_from_files(name)
    except ValueError as error:
        raise FileNotFoundError(
            f"--source=tfds:{name}: neither a folder with dataset_info.json nor a set in {tfds.core.constants.DATA_DIR}: {_MEND}"
        ) from error
