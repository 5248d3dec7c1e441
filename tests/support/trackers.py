"""What wandb, trackio and MLflow have stored on this machine, read by their own means."""

import json
import pathlib
import sqlite3
import struct
import warnings
from typing import Any, NamedTuple

import pytest

NAMES = ("wandb", "trackio", "mlflow")


class Record(NamedTuple):
  """One record of a run."""

  points: list[tuple[int, dict[str, Any]]]  # (our step, numbers), in the order of their coming
  config: dict[str, Any]
  images: list[pathlib.Path]
  ends: list[bool]  # whether it has failed, at the end of each start or of the last one


def needs(name):
  pytest.importorskip(name, reason=f"needs {name}: pip install -e '.[trackers]'")


def environment(folder: pathlib.Path) -> dict[str, str]:
  """Keeps all records in a folder, without a network."""
  return {
    "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio"),
    "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
  }  # fmt: skip


def read(name: str, folder: pathlib.Path, record: str) -> Record:
  """The record with this id, of all that a folder has."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return {"wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}[name](folder, record)


def status_in_mlflow(folder: pathlib.Path, record: str) -> str:
  import mlflow

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client.get_run(record).info.status


def _wandb(folder, record):
  """Offline, each start is a file of its own with the record's id, and `wandb sync` joins them."""
  points, config, images, ends = [], {}, [], []
  for path in sorted(folder.glob(f"wandb/offline-run-*-{record}/*.wandb")):
    for entry in _entries(path.read_bytes()):
      kind = entry.WhichOneof("record_type")
      if kind == "run":
        assert entry.run.run_id == record and not entry.run.git.commit
      if kind == "config":
        items = entry.config.update
        config |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
      elif kind == "history":
        items = entry.history.item
        values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
        points.append((values["step"], values))
      elif kind == "files":
        images += [path.parent / "files" / file.path for file in entry.files.files]
      elif kind == "exit":
        ends.append(bool(entry.exit.exit_code))
  return Record(points, config, images, ends)


def _entries(data):
  """The records of a .wandb file: blocks of 32 KiB, as of LevelDB's log."""
  from wandb.proto import wandb_internal_pb2

  assert data[:4] == b":W&B"
  at, whole = 7, b""
  while at + 7 <= len(data):
    if (left := 32768 - at % 32768) < 7:
      at += left
      continue
    _, size, kind = struct.unpack("<IHB", data[at : at + 7])
    whole += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # a whole record, or its last part
      entry = wandb_internal_pb2.Record()
      entry.ParseFromString(whole)
      whole = b""
      yield entry


def _trackio(folder, record):
  with sqlite3.connect(folder / "trackio/moe_jax.db") as base:
    rows = base.execute(
      "select step, metrics from metrics where run_name = ? order by id", (record,)
    ).fetchall()
    ((config,),) = base.execute("select config from configs where run_name = ?", (record,))
  points = [(step, json.loads(metrics)) for step, metrics in rows]
  images = [
    folder / "trackio/media" / value["file_path"]
    for _, values in points
    for value in values.values()
    if isinstance(value, dict)
  ]
  return Record(points, json.loads(config), images, [])


def _mlflow(folder, record):
  import mlflow

  client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
  run = client.get_run(record)
  history = [(m.step, {m.key: m.value}) for k in run.data.metrics
             for m in client.get_metric_history(record, k)]  # fmt: skip
  names = [file.path for file in client.list_artifacts(record)]
  images = [pathlib.Path(run.info.artifact_uri, name) for name in names]
  return Record(history, run.data.params, images, [run.info.status == "FAILED"])
