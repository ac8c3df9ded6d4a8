"""Read rows of Parquet files, like `tasks.lines`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnpress.tasks.lines import Numbered, TaskError

PARQUET = ".parquet"
ROWS_AT_ONCE = 1024


def parquet_rows(path: Path, wanted: Sequence[str] = ()) -> Numbered:
    """Rows of a Parquet file with their number, from 1. One row group is in memory at a time.

    Args:
        wanted: columns to read, as far as the file has them; all columns if none is named or present.

    Raises:
        TaskError: the file is not valid Parquet.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            number = 0
            for part in file.iter_batches(ROWS_AT_ONCE, columns=columns or None):
                for row in part.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise TaskError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:120]})") from None
