"""The data sets of TFDS's catalog, by name: found as they are prepared, or downloaded."""

import contextlib
import difflib
import functools
import importlib.util
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from google.protobuf import json_format

from moe_jax.data import cache
from moe_jax.errors import DamagedError, UserError

FORMAT = "array_record"  # TFDS's format with random access; its parquet loses rows


def find(name: str, others: list[str]) -> tfds.core.DatasetBuilder:
  """Returns a set of TFDS that is prepared in $TFDS_DATA_DIR, after preparing it if need be.

  Args:
    name: of the set, as TFDS writes it.
    others: names of sets that are not TFDS's, for the hints of an error.

  Raises:
    UserError: there is no such set, or it cannot be prepared here.
    DamagedError: what is prepared cannot be read.
  """
  import requests
  import tensorflow_datasets.text  # noqa: F401  registers c4, wikipedia and other old data sets

  data_dir = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
  refuse = functools.partial(_refusal, name, others, data_dir)
  with quiet():
    builder = _find(name, others, data_dir, refuse)
    prepared = builder.is_prepared()
  if not prepared:
    if not _online(requests.head):
      raise refuse("it is not prepared there, and there is no network to download it")
    cache.notice(f"downloading and preparing {name} in {data_dir}")
    tfds.enable_progress_bar()
    try:
      builder.download_and_prepare(file_format=FORMAT)
    except Exception as error:  # networks, disks, Beam and TensorFlow raise errors of many types
      why = f"preparing it failed: {first_line(error)}"
      if importlib.util.find_spec("tensorflow") is None:
        why += "; some sets need TensorFlow to be prepared: pip install tensorflow-cpu"
      raise refuse(why) from error
  formats = sorted(kind.value for kind in builder.info.available_file_formats())
  if FORMAT not in formats:
    raise refuse(
      f"it is prepared as {', '.join(formats)}, which has no random access; prepare it with "
      f"download_and_prepare(file_format='{FORMAT}') in another folder and set TFDS_DATA_DIR"
    )
  return builder


def damaged(name: str, folder: Any, why: str) -> DamagedError:
  """Returns the error for a prepared set that cannot be read."""
  return DamagedError(
    f"config.data.name={name!r}: cannot read {folder} ({why}); delete that folder to prepare it "
    "again"
  )


def _refusal(name: str, others: list[str], data_dir: str, why: str) -> UserError:
  return UserError(
    f"config.data.name={name!r} (looked in {data_dir}): {why}. Without a network there are "
    f"{', '.join(others)}, and any TFDS set prepared as {FORMAT} in {data_dir} (or "
    "TFDS_DATA_DIR)"
  )


def _find(
  name: str, others: list[str], data_dir: str, refuse: Callable[[str], UserError]
) -> tfds.core.DatasetBuilder:
  base = name.split("/")[0]
  if ":" in base and not base.split(":")[1][:1].isdigit():
    # For a community name TFDS asks the network, with retries, before it refuses.
    raise refuse(
      "community data sets are not supported; write its text to .jsonl and use name='text'"
    )
  try:
    return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    # Not tfds.list_builders(), which asks the network too.
    names = [*tfds.core.registered.list_imported_builders(), *others]
    near = ", ".join(difflib.get_close_matches(base, names, 3))
    raise refuse(f"TFDS has no such data set{near and '; similar names: ' + near}") from None
  except (json_format.ParseError, UnicodeDecodeError) as error:  # of dataset_info.json
    raise damaged(name, os.path.join(data_dir, base), first_line(error)) from None
  except (ValueError, TypeError, AssertionError, RuntimeError) as error:
    raise refuse(first_line(error)) from None


def _online(head: Callable[..., Any], seconds: float = 5) -> bool:
  """Returns whether the web answers within `seconds`; TFDS itself would retry for minutes."""
  answered = threading.Event()

  def ask(host: str) -> None:
    with contextlib.suppress(Exception):
      head(f"https://{host}", timeout=seconds)  # through the user's proxy, which TFDS uses too
      answered.set()

  hosts = ("storage.googleapis.com", "raw.githubusercontent.com", "huggingface.co")
  # Threads, because looking up a host's name has no timeout.
  threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in hosts]
  for thread in threads:
    thread.start()
  end = time.monotonic() + seconds
  while any(t.is_alive() for t in threads) and time.monotonic() < end and not answered.is_set():
    answered.wait(0.1)
  return answered.is_set()


def first_line(error: BaseException) -> str:
  """Returns the kind of an error and the first line of its message."""
  lines = [line for line in str(error).splitlines() if line.strip()]
  return f"{type(error).__name__}: {' '.join(lines[0].split()) if lines else ''}"[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Suppresses TFDS's banners, progress bars and warnings."""
  level = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(level)
