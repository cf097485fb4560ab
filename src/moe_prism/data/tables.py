"""Rows of tables: CSV as a stream, parquet and arrow in batches, a data set that was saved to disk."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UsageError
from ..tally import TextTally
from .fields import is_known, unknown_fields, wanted_columns
from .stream import EXTRA, ROW_CHARACTERS, Characters

BATCH = 256  # rows of a table in memory at a time
Row = tuple[int, Any]


def csv_rows(characters: Characters, names: Sequence[str]) -> Iterator[Row]:
    """(row, fields by the names in the first line). Commas, semicolons or tabs separate, by which of them the first line has most of.

    Raises UsageError where no column is known, CorruptError for a quotation without an end.
    """
    lines = _lines(characters)
    first = next(lines, "")
    separator = max(",;\t", key=first.count)
    before = csv.field_size_limit(ROW_CHARACTERS)
    try:
        header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
        if not is_known(header, names):
            raise unknown_fields(str(characters.path), header, names)
        for number, cells in enumerate(csv.reader(lines, delimiter=separator), 1):
            if cells:
                yield number, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise CorruptError(f"{characters.path} is no CSV: {error}", "write it again, or use .jsonl") from error
    finally:
        csv.field_size_limit(before)


def _lines(characters: Characters) -> Iterator[str]:
    for number, line in characters.lines():
        if line is None:
            raise CorruptError(f"{characters.path}:{number} is a line without an end", "write it again, or use .jsonl")
        yield f"{line}\n"


def parquet_rows(path: Path, names: Sequence[str]) -> Iterator[Row]:
    """(row, fields) of a parquet file; only columns of text are read."""
    parquet = _pyarrow(path, "parquet")
    with _explained(path), parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if not is_known(columns, names):
            raise unknown_fields(str(path), columns, names)
        batches = file.iter_batches(batch_size=BATCH, columns=wanted_columns(columns, names))
        yield from _numbered(batches)


def arrow_rows(path: Path, names: Sequence[str]) -> Iterator[Row]:
    """(row, fields) of an arrow file or stream, as `datasets` writes it."""
    ipc, lib = _pyarrow(path, "ipc"), _pyarrow(path, "lib")
    with _explained(path), lib.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        columns = reader.schema.names
        if not is_known(columns, names):
            raise unknown_fields(str(path), columns, names)
        wanted = wanted_columns(columns, names)
        every = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        small = (whole.slice(at, BATCH) for whole in every for at in range(0, whole.num_rows, BATCH))
        yield from _numbered(batch.select(wanted) for batch in small)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """pyarrow's errors are of many kinds, values that are no text included."""
    lib = _pyarrow(path, "lib")
    try:
        yield
    except (lib.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; damage has no number
            raise
        raise _damaged(path, error) from error


def _numbered(batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _pyarrow(path: Path, module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise UsageError(f"'{path}' is a table, and pyarrow is missing to read it", EXTRA) from error


def _damaged(path: Path, error: Exception) -> CorruptError:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return CorruptError(f"'{path}' cannot be read: {first[0]}", "restore the file from its source")


def saved_rows(folder: Path, names: Sequence[str], tally: TextTally) -> Iterator[tuple[str, int, Any]]:
    """(split, row, fields) of what `datasets` saved to disk. Of several splits, train alone where there is one."""
    try:
        from datasets import DatasetDict, load_from_disk
        from datasets.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UsageError(f"'{folder}' is a saved dataset, and the datasets library is missing", EXTRA) from error
    disable_progress_bar()
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # of many kinds, from files that anybody may have written
        raise _damaged(folder, error) from error
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"rows": loaded}
    for split, rows in splits.items():
        if "train" in splits and split != "train":
            tally.leave_out("rows of other splits than train", split, len(rows))
            continue
        columns = rows.column_names
        if not is_known(columns, names):
            raise unknown_fields(str(folder), columns, names)
        table = rows.select_columns(wanted_columns(columns, names)).with_format("arrow")
        with _explained(folder):
            yield from ((split, number, row) for number, row in _numbered(table.iter(BATCH)))
