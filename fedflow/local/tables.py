"""A site's tables and images as columns of numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedflow.algorithms.statistics import Dataset, StatisticsPolicy
from fedflow.errors import ResolveError, field_error
from fedflow.local.own import OwnData

__all__ = ["Images", "TableData", "Tables", "columns_of", "datasets_of"]

RESERVED = "not_numeric"
"""What a dataset cannot be called."""


class Tables:
    """Datasets of a site: `Tables(train="train.parquet", test=frame)`.

    A table is a path of a .csv or a .parquet file, a pandas DataFrame, an Arrow table, a NumPy array (two-dimensional, or structured), a
    mapping of names to columns, or `Images`.
    policy: what may be known of them, where the site's configuration says nothing
    """

    def __init__(self, policy: StatisticsPolicy | Mapping[str, Any] | None = None, **tables: Any) -> None:
        self.policy = StatisticsPolicy.model_validate(policy or {})
        self.tables = tables


class Images:
    """Images whose intensities are looked at: "intensity", or "intensity/0" … of several channels.

    images: NumPy arrays, (H, W) or (H, W, C), or paths of .npy files or of whatever Pillow reads; or a folder of these
    """

    def __init__(self, images: str | Path | Iterable[Any]) -> None:
        self.images = (
            sorted(p for p in Path(images).iterdir() if p.is_file()) if isinstance(images, (str, Path)) else images
        )

    def dataset(self) -> Dataset:
        """All pixels of all images, channel by channel."""
        parts: dict[str, list[NDArray[np.float64]]] = {}
        count = 0
        for image in self.images:
            array, count = _image(image), count + 1
            channels = [array] if array.ndim == 2 else [array[..., i] for i in range(array.shape[-1])]
            for i, channel in enumerate(channels):
                name = "intensity" if len(channels) == 1 else f"intensity/{i}"
                parts.setdefault(name, []).append(np.asarray(channel, dtype=np.float64).ravel())
        columns = {name: _finite(np.concatenate(pixels)) for name, pixels in parts.items()}
        return Dataset(columns, count)


def _image(image: Any) -> NDArray[Any]:
    array = _read_image(Path(image)) if isinstance(image, (str, Path)) else np.asarray(image)
    if array.ndim not in (2, 3):
        raise ResolveError(field_error("image", list(array.shape), "(H, W) or (H, W, C)", "leave it out"))
    return array


def _read_image(path: Path) -> NDArray[Any]:
    if path.suffix == ".npy":
        found: NDArray[Any] = np.load(path)  # whose default runs no code
        return found
    try:
        from PIL import Image
    except ImportError as error:
        raise ResolveError("images: found no Pillow, expected it; pip install pillow, or give .npy files") from error
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except OSError as error:
        raise ResolveError(field_error("image", str(path), "an image that can be read", f"{error}")) from error


class TableData(OwnData):
    """A site's data as tables."""

    @property
    def policy(self) -> StatisticsPolicy:
        """The site's configuration's; else that of its `Tables`; else the default."""
        if self.config is not None and self.config.statistics is not None:
            return self.config.statistics
        return self.data.policy if isinstance(self.data, Tables) else StatisticsPolicy()

    def datasets(self) -> dict[str, Dataset]:
        return datasets_of(self.data)


# -- tables ------------------------------------------------------------------------------------------------------------
def datasets_of(data: Any) -> dict[str, Dataset]:
    """The datasets of what a workload made, by name; a single table is "data". Raises ResolveError where it is none of them."""
    tables: Mapping[str, Any] = data.tables if isinstance(data, Tables) else {"data": data}
    if RESERVED in tables:
        raise ResolveError(field_error("workload", RESERVED, "another name for a dataset", "rename it"))
    return {
        name: table.dataset() if isinstance(table, Images) else _dataset(name, table) for name, table in tables.items()
    }


def _dataset(name: str, table: Any) -> Dataset:
    raw = columns_of(name, table)
    lengths = {len(column) for column in raw.values()}
    if len(lengths) > 1:
        raise ResolveError(field_error(f"table {name!r}", sorted(lengths), "columns of one length", "mend it"))
    columns: dict[str, tuple[NDArray[np.float64], int]] = {}
    others = []
    for feature, values in raw.items():
        numbers = _numbers(values)
        if numbers is None:
            others.append(feature)
        else:
            columns[feature] = _finite(numbers)
    return Dataset(columns, lengths.pop() if lengths else 0, others)


def _finite(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    good = np.isfinite(values)
    return values[good], int(len(values) - good.sum())


def _numbers(values: Any) -> NDArray[np.float64] | None:
    """As floats, NaN for what is missing or no number; None where nothing in a column with something in it is one."""
    array = np.asarray(values)
    if array.dtype.kind in "biuf":
        return array.astype(np.float64)
    if array.dtype.kind not in "OUS":
        return None
    found = np.array([_number(value) for value in array.tolist()], dtype=np.float64)
    return found if np.isfinite(found).any() or not len(found) else None


def _number(value: Any) -> float:
    try:
        return float("nan") if value is None or isinstance(value, (bytes, complex)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def columns_of(name: str, table: Any) -> dict[str, Any]:
    """Name -> column, of whatever kind of table."""
    if isinstance(table, (str, Path)):
        return _read(Path(table))
    if isinstance(table, np.ndarray):
        return _of_array(name, table)
    if isinstance(table, Mapping):
        return {str(column): _one_dimension(f"{name}: {column}", values) for column, values in table.items()}
    if hasattr(table, "column_names") and hasattr(table, "to_pydict"):
        return {column: _of_arrow(table.column(column)) for column in table.column_names}
    if hasattr(table, "columns") and hasattr(table, "to_numpy"):
        return {str(column): table[column].to_numpy() for column in table.columns}
    kinds = "a path of .csv or .parquet, a DataFrame, an Arrow table, an array, or a mapping of columns"
    raise ResolveError(
        field_error(f"table {name!r}", type(table).__name__, kinds, "let the workload return one, or Tables")
    )


def _of_array(name: str, table: NDArray[Any]) -> dict[str, Any]:
    if table.dtype.names:
        return {column: table[column] for column in table.dtype.names}
    if table.ndim != 2:
        raise ResolveError(field_error(f"table {name!r}", list(table.shape), "(rows, columns)", "reshape it"))
    return {str(i): table[:, i] for i in range(table.shape[1])}


def _one_dimension(name: str, values: Any) -> Any:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ResolveError(field_error(f"table {name}", list(array.shape), "a column", "give one value a row"))
    return array


def _of_arrow(column: Any) -> Any:
    """Missing values as NaN in columns of numbers, as None in others."""
    import pyarrow

    kind = column.type
    plain = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)
    if plain and not column.null_count:
        return column.to_numpy(zero_copy_only=False) if isinstance(column, pyarrow.Array) else column.to_numpy()
    return np.array(column.to_pylist(), dtype=object)


def _read(path: Path) -> dict[str, Any]:
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        fix = "convert it, or let the workload read it"
        raise ResolveError(field_error("table", str(path), f"a file that ends in one of {', '.join(readers)}", fix))
    try:
        return readers[path.suffix](path)
    except OSError as error:
        raise ResolveError(field_error("table", str(path), "a file that can be read", f"{error}")) from error


def _read_csv(path: Path) -> dict[str, Any]:
    """Every cell a text; an empty one is missing."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        cells: list[list[str]] = list(rows)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ResolveError(field_error(f"table {path}", twice, "columns with names of their own", "rename them"))
    if bad := [i for i, row in enumerate(cells, start=2) if len(row) != len(names)]:
        found = f"line {bad[0]} with {len(cells[bad[0] - 2])} cells"
        raise ResolveError(field_error(f"table {path}", found, f"{len(names)} in each line", "mend the file"))
    return {name: np.array([row[i] or None for row in cells], dtype=object) for i, name in enumerate(names)}


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ResolveError("Parquet: found no pyarrow, expected it; pip install 'fedflow[parquet]'") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.lib.ArrowInvalid as error:
        raise ResolveError(field_error("table", str(path), "a Parquet file", f"{error}")) from error
    return {column: _of_arrow(table.column(column)) for column in table.column_names}
