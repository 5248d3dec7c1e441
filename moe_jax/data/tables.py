"""Reads the texts of a column of Parquet and Arrow files, some megabytes at a time.

Imports pyarrow where it is needed: most runs read no table.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from moe_jax.errors import UserError, short

SUFFIXES = (".parquet", ".arrow", ".feather")
_BATCH = 2**23  # bytes of text that are decoded together


def is_table(name: str) -> bool:
  return name.lower().endswith(SUFFIXES)


def num_rows(path: pathlib.Path, column: str) -> int:
  """Returns the number of rows, of which a Parquet file reads nothing but its footer."""
  with _opened(path, column) as (count, batches):
    return sum(map(len, batches)) if count is None else count


def texts(
  path: pathlib.Path, column: str, keep: Callable[[int], bool]
) -> Iterator[tuple[int, str | bytes]]:
  """Yields (row, text) of the rows, from 0, that `keep` names; of a null "".

  Args:
    path: a Parquet file, or an Arrow file of either format.
    column: its name; "message.text" is the field of a struct.
    keep: says of a row whether its text is wanted.

  Raises:
    OSError: the file cannot be read, or is damaged.
    UserError: it has no such column of texts.
  """
  row = 0
  with _opened(path, column) as (_, batches):
    for batch in batches:
      for place in range(len(batch)):
        if keep(row + place):  # not batch.take, which imports pandas
          yield row + place, batch[place].as_py() or ""
      row += len(batch)


@contextlib.contextmanager
def _opened(path: pathlib.Path, column: str) -> Iterator[tuple[int | None, Iterator[Any]]]:
  """Opens a table, and gives the number of its rows, if it is known, and its column in pieces."""
  import pyarrow
  from pyarrow import compute, parquet

  try:
    with contextlib.ExitStack() as stack:
      if path.suffix.lower() == ".parquet":
        # Without the buffer of whole column chunks, which may be gigabytes.
        file = stack.enter_context(parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False))
        names = _find(path, file.schema_arrow, column)
        about = file.metadata
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        size = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
        rows = min(max(_BATCH // max(size, 1), 1), 2**16)
        count, batches = about.num_rows, file.iter_batches(rows, columns=[column])
      else:
        source = stack.enter_context(pyarrow.memory_map(str(path)))
        stream = source.read(6) != b"ARROW1"  # which datasets.save_to_disk writes
        schema = _reader(source, stream).schema
        names = _find(path, schema, column)
        reader = _reader(source, stream, [schema.get_field_index(names[0])])
        count, numbers = None, () if stream else range(reader.num_record_batches)
        batches = iter(reader) if stream else map(reader.get_batch, numbers)
      pieces = (batch.column(names[0]) for batch in batches)
      yield count, (compute.struct_field(x, names[1:]) if names[1:] else x for x in pieces)
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise OSError(short(error)) from None


def _reader(source: Any, stream: bool, fields: list[int] | None = None) -> Any:
  """Returns a reader of a whole Arrow file, of all fields or these."""
  import pyarrow

  source.seek(0)
  options = pyarrow.ipc.IpcReadOptions(included_fields=fields or [])
  return (pyarrow.ipc.open_stream if stream else pyarrow.ipc.open_file)(source, options=options)


def _find(path: pathlib.Path, schema: Any, column: str) -> list[str]:
  """Returns the names that lead to a column of texts: ["message", "text"]."""
  from pyarrow import types

  def is_text(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary)
    return any(test(kind) for test in (*tests, types.is_large_binary))

  def leaves(fields: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for field in fields:
      yield (*before, field.name), field.type
      if types.is_struct(field.type):
        yield from leaves(field.type, (*before, field.name))

  # A column of that very name comes before the field of a struct.
  by_depth = sorted(leaves(schema), key=lambda leaf: -len(leaf[0]))
  found = {".".join(names): (names, kind) for names, kind in by_depth}
  known = ", ".join(name for name, (_, kind) in found.items() if is_text(kind)) or "none"
  if column not in found:
    raise UserError(
      f"config.data.column={column!r}: {path} has no such column; its columns of text: {known}"
    )
  names, kind = found[column]
  if len(schema.get_all_field_indices(names[0])) > 1:
    raise UserError(f"config.data.column={column!r}: {path} has that column twice; rename one")
  if not is_text(kind):
    raise UserError(
      f"config.data.column={column!r}: {path} has {kind} there, not text; its columns of text: "
      f"{known}"
    )
  return list(names)
