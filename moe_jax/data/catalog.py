"""The data sets of TFDS's catalog, by name: found as they are prepared, or downloaded."""

import contextlib
import difflib
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from google.protobuf import json_format

from moe_jax.config import Data
from moe_jax.data.documents import Documents, no_split
from moe_jax.errors import DamagedError, UserError, notice, short

_FORMAT = "array_record"  # TFDS's format with random access; its parquet loses rows


def documents(config: Data, split: str, others: list[str]) -> Documents:
  """Returns the documents of `split` of a set of TFDS, which is prepared on first use.

  `others` are names of sets that are not TFDS's, for the hints of an error.

  Raises:
    UserError: there is no such set, split or text field, or it cannot be prepared here.
    DamagedError: what is prepared cannot be read.
  """
  builder, field = find(config.name, others), config.column
  if field not in builder.info.features:
    raise UserError(
      f"config.data.column={field!r} is not a field of config.data.name={config.name!r}, which "
      f"has: {', '.join(builder.info.features)}"
    )
  name = getattr(config, f"{split}_split")
  try:
    with quiet():
      source = builder.as_data_source(name)
      first = source[0][field]
  except (ValueError, KeyError, AssertionError, IndexError, NotImplementedError) as error:
    raise no_split(config, split, list(builder.info.splits), error) from None
  except RuntimeError as error:  # which array_record raises for a wrong checksum
    raise _damaged(config.name, builder.data_dir, error) from None
  if not isinstance(first, bytes | str):
    raise UserError(f"config.data.column={field!r} holds {type(first).__name__}, not text")

  def read() -> Iterator[tuple[int, str, bytes]]:
    for index in range(len(source)):
      try:
        text = source[index][field]
      except RuntimeError as error:
        raise _damaged(config.name, builder.data_dir, error) from None
      yield index, "", text.encode() if isinstance(text, str) else text

  info = pathlib.Path(builder.data_dir) / "dataset_info.json"
  made = [hashlib.sha256(info.read_bytes()).hexdigest(), info.stat().st_mtime_ns]
  identity = json.dumps([str(info.parent), *made, name, field])
  return Documents(identity, (), lambda: (len(source), read()))


def find(name: str, others: list[str]) -> tfds.core.DatasetBuilder:
  """Returns a set of TFDS that is prepared in $TFDS_DATA_DIR, after preparing it if need be.

  `others` are names of sets that are not TFDS's, for the hints of an error.

  Raises:
    UserError: there is no such set, or it cannot be prepared here.
    DamagedError: what is prepared cannot be read.
  """
  import requests
  import tensorflow_datasets.text  # noqa: F401  registers c4, wikipedia and other old data sets

  data_dir = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")

  def refuse(why: str) -> UserError:
    return UserError(
      f"config.data.name={name!r} (looked in {data_dir}): {why}. Without a network there are "
      f"{', '.join(others)}, and any TFDS set prepared as {_FORMAT} in {data_dir} (or "
      "TFDS_DATA_DIR)"
    )

  with quiet():
    builder = _find(name, others, data_dir, refuse)
    prepared = builder.is_prepared()
  if not prepared:
    if not _online(requests.head):
      raise refuse("it is not prepared there, and there is no network to download it")
    notice(f"downloading and preparing {name} in {data_dir}")
    tfds.enable_progress_bar()
    try:
      builder.download_and_prepare(file_format=_FORMAT)
    except Exception as error:  # networks, disks, Beam and TensorFlow raise errors of many types
      why = f"preparing it failed: {short(error)}"
      if importlib.util.find_spec("tensorflow") is None:
        why += "; some sets need TensorFlow to be prepared: pip install tensorflow-cpu"
      raise refuse(why) from error
  formats = sorted(kind.value for kind in builder.info.available_file_formats())
  if _FORMAT not in formats:
    raise refuse(
      f"it is prepared as {', '.join(formats)}, which has no random access; prepare it with "
      f"download_and_prepare(file_format='{_FORMAT}') in another folder and set TFDS_DATA_DIR"
    )
  return builder


def _damaged(name: str, folder: Any, error: Exception) -> DamagedError:
  return DamagedError(
    f"config.data.name={name!r}: cannot read {folder} ({short(error)}); delete that folder to "
    "prepare it again"
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
    raise _damaged(name, os.path.join(data_dir, base), error) from None
  except (ValueError, TypeError, AssertionError, RuntimeError) as error:
    raise refuse(" ".join(str(error).split())[:300]) from None


def _online(head: Callable[..., Any], seconds: float = 5) -> bool:
  """Returns whether the web answers within `seconds`; TFDS itself would retry for minutes."""
  answers: list[Any] = []

  def ask() -> None:
    for host in ("storage.googleapis.com", "raw.githubusercontent.com", "huggingface.co"):
      with contextlib.suppress(Exception):
        # Through the user's proxy, which TFDS uses too.
        return answers.append(head(f"https://{host}", timeout=seconds / 3))

  # A thread, because looking up a host's name has no timeout.
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(seconds)
  return bool(answers)


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
