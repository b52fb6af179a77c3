"""Rows of Parquet files as Arrow tables: some at a time, only the columns that are needed, from disk or the Hub.

The reading of `datasets` holds a whole row group, which for photographs may be the whole file, several times over.
Here a few rows are decoded at a time, from a buffer of each column.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import DownloadConfig
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils.file_utils import is_local_path, xopen


_ROWS = 16  # of a table, unless `batch_size` tells otherwise
_BUFFER = 1 << 23  # bytes that are read of a column at a time: one request, where it is remote


class ParquetRows(Parquet):
    """The builder of `datasets`, with its own way to read."""

    def _generate_tables(
        self, files: Sequence[str], row_groups_list: Sequence[Sequence[int] | None]
    ) -> Iterator[tuple[Any, pyarrow.Table]]:
        columns = list(self.info.features)
        remote = DownloadConfig(token=self.token, storage_options=self.storage_options)
        for number, (path, groups) in enumerate(zip(files, row_groups_list, strict=True)):
            with contextlib.ExitStack() as stack:
                # What is local, Arrow reads without asking Python.
                file = path if is_local_path(path) else stack.enter_context(xopen(path, "rb", download_config=remote))
                rows = stack.enter_context(pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False))
                # Files may lack a column that others have.
                known = [name for name in columns if name in rows.schema_arrow.names]
                size = self.config.batch_size or _ROWS
                batches = rows.iter_batches(size, row_groups=groups, columns=known, use_threads=False)
                for count, batch in enumerate(batches):
                    yield Key(number, count), self._cast_table(pyarrow.Table.from_batches([batch]))
