"""TFDS builder of training rows: JSON lines or Parquet to a random-access data set, without TensorFlow.

    python -m a2d_jax.safety_rows --files train.jsonl,more.parquet --data_dir DIR

prints the folder that it wrote; that folder is a data file for training like any other. The records are array_record
files, the format of TFDS that needs neither TensorFlow to write nor to read (importlib_resources must be installed).
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags

from a2d_jax.rows import Row, read_rows


@dataclasses.dataclass(eq=False)
class SafetyRowsConfig(tfds.core.BuilderConfig):
    """Which files a data set is made of; the name carries a fingerprint of their bytes: a changed file is a new set."""

    files: tuple[str, ...] = ()


class SafetyRows(tfds.core.GeneratorBasedBuilder):
    """Rows in the order of the files: prompt and response, or a document's text."""

    VERSION = tfds.core.Version("1.1.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "is_document": np.bool_,
                "prompt": tfds.features.Text(),
                "response": tfds.features.Text(),
                "rejected": tfds.features.Text(),  # empty where the row is no pair
                "text": tfds.features.Text(),
                "is_safe": np.bool_,
                # Names differ between sources, so a list of pairs and not one feature a name.
                "category": tfds.features.Sequence({"name": tfds.features.Text(), "value": np.bool_}),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # all files are local
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = (row for file in self.builder_config.files for row in read_rows(file).rows)
        for number, row in enumerate(rows):
            yield number, _to_example(row)


def _to_example(row: Row) -> dict[str, Any]:
    category = row.category or {}
    return {
        "is_document": row.is_document,
        "prompt": row.prompt or "",
        "response": row.response or "",
        "rejected": row.rejected or "",
        "text": row.text or "",
        "is_safe": row.is_safe,
        "category": [{"name": name, "value": value} for name, value in category.items()],
    }


def prepare(files: Sequence[str | os.PathLike], data_dir: str | os.PathLike) -> Path:
    """Writes the data set of some row files under data_dir, unless it is there already; returns its folder."""
    files = tuple(os.fspath(file) for file in files)
    if not files:
        raise ValueError("no row files given; name one .jsonl or .parquet file at least")
    digest = hashlib.sha256()
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"no row file at {file!r}; give .jsonl or .parquet files")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    config = SafetyRowsConfig(name=f"{Path(files[0]).stem}-{digest.hexdigest()[:8]}", files=files)
    builder = SafetyRows(config=config, data_dir=os.fspath(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def main(_) -> None:
    folder = prepare(flags.FLAGS.files, flags.FLAGS.data_dir)
    print(f"{len(read_rows(folder).rows)} rows in {folder}")


if __name__ == "__main__":
    # Not at import: other programs read prepared folders and have flags of their own.
    flags.DEFINE_list("files", None, "Row files (.jsonl, .parquet), comma separated.", required=True)
    flags.DEFINE_string("data_dir", None, "Folder under which the data set is written.", required=True)
    app.run(main)
