"""The process in which the library of a tracker runs; it imports no jax.

python -m moe_jax.training.tracker_worker NAME WORKDIR

It reads messages of tracker.py, a JSON object a line, until its input ends. The first failure is
told in one line, and ends it with code 1.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import uuid
from typing import Any, TextIO

from moe_jax.config.fields import flatten
from moe_jax.errors import short, shown
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib

_PROJECT = "moe_jax"
_ROOT = pathlib.Path(__file__).parents[2]


class Wandb:
  """What the record of each library has: its id, the place where to see it, and four functions."""

  def __init__(self, name: str, record: str, config: dict[str, Any]):
    """Opens the record with the id `record`, or a new one where that is empty."""
    import wandb

    # Nothing of the machine but its load: a git remote or a command line can have a secret.
    settings = wandb.Settings(
      console="off",
      disable_git=True,
      save_code=False,
      x_disable_meta=True,
      x_save_requirements=False,
    )
    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    record = record or uuid.uuid4().hex[:8]
    self._run = wandb.init(project=project, id=record, name=name, resume="allow", settings=settings)
    self._run.config.update(config, allow_val_change=True)
    # Its own steps only grow, and a run that was killed takes some of ours again.
    self._run.define_metric("*", step_metric="step")
    self.id, self.place, self._image = (
      record,
      self._run.url or self._run.settings.sync_dir,
      wandb.Image,
    )

  def log(self, step: int, scalars: dict[str, float]) -> None:
    self._run.log(scalars | {"step": step})

  def attach(self, step: int, images: list[pathlib.Path]) -> None:
    self._run.log({"step": step} | {image.stem: self._image(str(image)) for image in images})

  def end(self, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


class Trackio:
  def __init__(self, name: str, record: str, config: dict[str, Any]):
    import trackio

    self.id = record or f"{name}-{uuid.uuid4().hex[:4]}"  # a name, of which one run is continued
    project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
    self._run = trackio.init(project, self.id, config=config, resume="allow", embed=False)
    self.place, self._image = f"trackio show --project {project}", trackio.Image

  def log(self, step: int, scalars: dict[str, float]) -> None:
    self._run.log(scalars, step)

  def attach(self, step: int, images: list[pathlib.Path]) -> None:
    self._run.log({image.stem: self._image(image) for image in images}, step)

  def end(self, failed: bool) -> None:
    self._run.finish()


class Mlflow:
  def __init__(self, name: str, record: str, config: dict[str, Any]):
    import mlflow

    self._mlflow, self.place = mlflow, mlflow.get_tracking_uri()
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
    run = mlflow.start_run(record or None, run_name=name)
    self.id, before = run.info.run_id, run.data.params
    for part in _parts(config):
      mlflow.log_params({k: v for k, v in part.items() if k not in before})
      # A parameter never changes there; what another start has changed is a tag.
      mlflow.set_tags({k: v for k, v in part.items() if before.get(k, str(v)) != str(v)})

  def log(self, step: int, scalars: dict[str, float]) -> None:
    for part in _parts(scalars):
      self._mlflow.log_metrics(part, step)

  def attach(self, step: int, images: list[pathlib.Path]) -> None:
    for image in images:
      self._mlflow.log_artifact(str(image))

  def end(self, failed: bool) -> None:
    self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _parts(values: dict[str, Any]) -> list[dict[str, Any]]:
  """Splits values into the hundred that MLflow takes at once."""
  items = list(values.items())
  return [dict(items[i : i + 100]) for i in range(0, len(items), 100)]


TRACKERS: dict[str, Any] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def commit() -> str:
  """Returns the checkout's commit, with + if files differ from it; "" outside a checkout."""
  try:
    git = subprocess.run(
      ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return ""
  return git.stdout.strip()


def begin(name: str, workdir: pathlib.Path) -> Any:
  """Returns the record of a run, the one that an earlier start has begun if that is of NAME."""
  known = workdir_lib.read_object(workdir / workdir_lib.TRACKER)
  record = known["id"] if known.get("tracker") == name else ""
  config = flatten(workdir_lib.read_config(workdir)) | {"commit": commit()}
  for kind, kernel in workdir_lib.read_kernels(workdir).items():
    config[f"kernels.{kind}"] = kernel
  opened = TRACKERS[name]("-".join(workdir.parts[-2:]), record, config)
  workdir_lib.write_object(workdir / workdir_lib.TRACKER, {"tracker": name, "id": opened.id})
  return opened


def follow(name: str, workdir: pathlib.Path, messages: TextIO, out: TextIO) -> None:
  """Does what the messages say; without the last one, the record is one of a failure."""
  record, failed = begin(name, workdir), True
  print(shown(f"--tracker={name}: record {record.id}, {record.place}"), file=out, flush=True)
  for line in messages:
    message = json.loads(line)
    if "scalars" in message:
      record.log(**message)
    elif "images" in message:
      with tempfile.TemporaryDirectory() as folder:
        record.attach(message["step"], [_copy(image, folder) for image in message["images"]])
    else:
      failed = message["failed"]
  record.end(failed)


def _copy(image: str, folder: str) -> pathlib.Path:
  """Returns a copy of an image, which may be in an object store, on this machine."""
  path = workdir_lib.open_path(image)
  copy = pathlib.Path(folder, path.name)
  copy.write_bytes(files.read_bytes(path))
  return copy


def main() -> None:
  """Follows stdin; the libraries say nothing on stdout."""
  name, workdir = sys.argv[1:]
  for number in (signal.SIGINT, signal.SIGTERM):  # of a scheduler, to every process of a job
    signal.signal(number, signal.SIG_IGN)
  out, sys.stdout = sys.stdout, sys.stderr
  try:
    follow(name, workdir_lib.open_path(workdir), sys.stdin, out)
  except Exception as error:  # whatever a library raises
    said = f"--tracker={name} is off until the next start, and the run goes on: {short(error)}"
    print(shown(said), file=out, flush=True)
    os._exit(1)  # a library could wait for a network


if __name__ == "__main__":
  main()
