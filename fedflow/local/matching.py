"""Items of a site's for private set intersection, and its tables brought into the order of what all sites have in common."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedflow.algorithms.psi import PSI, Item
from fedflow.errors import ResolveError, field_error
from fedflow.local.own import OwnData
from fedflow.local.tables import columns_of

__all__ = ["ItemData", "KeyedTable", "items_of", "rows_of"]


class KeyedTable:
    """A table in a .csv or .parquet file whose rows have a key: the workload of a private set intersection, after which its rows that all
    sites have lie in `aligned`, in one order at every site.

    key:     the column
    aligned: a file of the same kind, written whole or not at all; default: none is
    """

    def __init__(self, path: str | Path, key: str, aligned: str | Path | None = None) -> None:
        self.path, self.key, self.aligned = Path(path), key, None if aligned is None else Path(aligned)
        if self.aligned is not None and self.aligned.suffix != self.path.suffix:
            expected = f"a name that ends in {self.path.suffix}, as the table's"
            raise ResolveError(field_error("workload.args.aligned", str(aligned), expected, "rename it"))

    def items(self, item: Item) -> Iterable[Any]:
        """The keys, a row each. Raises ResolveError where the table cannot be read, has no such column, or has a key twice."""
        keys = items_of(self.path, self.key)
        rows_of(keys, (), item)
        return keys

    def align(self, items: Sequence[str], item: Item) -> None:
        """Write the rows of `items`, in their order."""
        if self.aligned is None:
            return
        rows = rows_of(items_of(self.path, self.key), items, item)
        handle, name = tempfile.mkstemp(dir=self.aligned.absolute().parent, prefix=f".{self.aligned.name}-")
        os.close(handle)
        try:
            _writer(self.path)(self.path, rows, Path(name))
            Path(name).replace(self.aligned)
        finally:
            Path(name).unlink(missing_ok=True)


class ItemData(OwnData):
    """A site's data as items."""

    def items(self, column: str | None, item: Item) -> Iterable[Any]:
        return self.data.items(item) if isinstance(self.data, KeyedTable) else items_of(self.data, column)

    def matched(self, items: Sequence[str], item: Item) -> None:
        """By its method of this name, where it has one."""
        if isinstance(self.data, KeyedTable):
            self.data.align(items, item)
        elif callable(found := getattr(self.data, "matched", None)):
            found(items)


def rows_of(keys: Iterable[Any], items: Sequence[str], item: Item | None = None) -> NDArray[np.int64]:
    """(len(items),) the row of each item.

    keys: of the table's rows, in their order
    item: what makes an item of a key: `recipe.algorithm.item`. Default: that of a recipe that says nothing about texts

    Raises ResolveError where two rows have one key, or an item has no row.
    """
    found: dict[str, int] = {}
    text_of = item or PSI().item
    for row, key in enumerate(keys):
        if (text := text_of(key)) is None:
            continue
        if text in found:
            told = f"rows {found[text]} and {row} with one key"
            raise ResolveError(field_error("table", told, "a key of its own for every row", "leave one of them out"))
        found[text] = row
    if missing := sum(item not in found for item in items):
        fix = "run the intersection again: the table has changed since"
        raise ResolveError(field_error("table", f"no rows for {missing} items", "a row for each", fix))
    return np.array([found[item] for item in items], dtype=np.int64)


def items_of(data: Any, column: str | None) -> Iterable[Any]:
    """Single values: those of a column where `data` is a table, else its own. Raises ResolveError where it has none."""
    is_table = isinstance(data, (str, Path, Mapping)) or hasattr(data, "columns") or hasattr(data, "column_names")
    if column is not None:
        columns = columns_of("data", data)
        if column not in columns:
            raise ResolveError(
                field_error("algorithm.column", column, f"one of {sorted(columns)}", "name the column with the items")
            )
        values: list[Any] = columns[column].tolist()
        return values
    if is_table or not isinstance(data, Iterable):
        expected = "texts and whole numbers, or a table with algorithm.column"
        raise ResolveError(
            field_error("workload", type(data).__name__, expected, "let it return a list, or name the column")
        )
    found: Iterable[Any] = data
    return found


# -- files ---------------------------------------------------------------------------------------------------------------
def _writer(path: Path) -> Callable[[Path, NDArray[np.int64], Path], None]:
    """Writes rows of a table into another; the table was read before, and so is of a known kind."""
    return _write_csv if path.suffix == ".csv" else _write_parquet


def _write_csv(table: Path, rows: NDArray[np.int64], to: Path) -> None:
    with table.open(newline="", encoding="utf-8") as file:
        header, *cells = csv.reader(file)
    with to.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(cells[row] for row in rows)])


def _write_parquet(table: Path, rows: NDArray[np.int64], to: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(table).take(rows), to)
