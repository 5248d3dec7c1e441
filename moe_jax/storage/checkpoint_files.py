"""What is around Orbax: a checkpoint's small files, remains of saves, late messages. No jax."""

import concurrent.futures
import contextlib
import functools
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

from moe_jax.errors import DamagedError
from moe_jax.storage import files

DELETED = "deleted"  # a folder in that of the checkpoints, of those that no run needs
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a folder that is not completely written
_METADATA = "_CHECKPOINT_METADATA"
_METRICS = "metrics/metrics"


def delete_remains(checkpoints: pathlib.Path) -> None:
  """Deletes what a save or a deletion that was cut off has left."""
  _delete_all(checkpoints / DELETED)
  for partial in checkpoints.glob(f"*{_TEMPORARY}*"):
    shutil.rmtree(partial, ignore_errors=True)


class Unneeded:
  """The checkpoints that no run needs. Orbax moves them to one folder, which takes it no time.

  That is so on a disk. In an object store Orbax deletes them itself.
  """

  def __init__(self, checkpoints: pathlib.Path):
    self._folder = checkpoints / DELETED
    self._thread = concurrent.futures.ThreadPoolExecutor(1)

  def delete(self) -> None:
    """Deletes them while training goes on."""
    self._thread.submit(_delete_all, self._folder)

  def close(self) -> None:
    """Waits until they are deleted."""
    self._thread.shutdown()
    with contextlib.suppress(OSError):  # there is none
      self._folder.rmdir()


def _delete_all(folder: pathlib.Path) -> None:
  for path in folder.glob("*"):
    shutil.rmtree(path, ignore_errors=True)


def unreadable(folder: pathlib.Path) -> str:
  """Returns what is wrong with the small files of a checkpoint, by which Orbax opens and keeps it.

  "" where they are as they should be.
  """
  try:
    found = [files.read_json(folder / n, "") for n in (_METADATA, _METRICS, "about/metadata")]
  except DamagedError as error:
    return str(error)
  items, loss = found[0].get("item_handlers"), found[1].get("loss")
  if not isinstance(items, dict) or not isinstance(loss, float):
    return f"{folder} has no {'items' if not isinstance(items, dict) else 'loss'}"
  # A checkpoint of before there were digests has no copy of its loss.
  about = found[2].get("about", {"loss": str(loss)})
  saved = about.get("loss") if isinstance(about, dict) else about
  return "" if saved == str(loss) else f"the loss is {loss}, not {saved}"


def has_digests(folder: pathlib.Path) -> bool:
  """Returns whether a checkpoint was saved with digests, also where they are missing now."""
  items = files.read_json(folder / _METADATA, "").get("item_handlers")
  return (folder / "about").exists() or "about" in str(items)


def next_batch(folder: pathlib.Path) -> int | None:
  """Returns the number of the batch after a checkpoint of before there were digests.

  Every process wrote a file, all with the same number. None where there is none.
  """
  paths = sorted((folder / "data").glob("process_*.json"))
  number = files.read_json(paths[0], "").get("next_index") if paths else None
  return number if isinstance(number, int) else None


@functools.cache  # once
def silence_late_answers() -> None:
  """Ignores what is still printed of other arrays, and Orbax's warning for whoever only reads."""
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  logging.getLogger("absl").addFilter(lambda record: "is read only" not in str(record.msg))

  def without_late_answers(hook: Callable[..., Any], *error: Any) -> None:
    if "Event loop is closed" not in str(error):  # to which TensorStore answers late
      hook(*error)

  for name in ("unraisablehook", "excepthook"):  # a library in C++ may call either
    setattr(sys, name, functools.partial(without_late_answers, getattr(sys, name)))
