"""A run's record in a tracker (wandb, trackio, mlflow), which a process of its own keeps.

python -m moe_jax.training.tracker NAME WORKDIR LINES [PLOT ...]

That process reads metrics.jsonl as it grows. So what such a library does to a process (threads,
signal handlers, hooks at the end), how long it waits for a network, and how it fails, is nothing to
the training; and what one start has not sent, the next one sends. It imports no jax.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, TextIO

from moe_jax.config.fields import flatten
from moe_jax.errors import UserError, notice, short, shown
from moe_jax.start import progress
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib

NAMES = ("wandb", "trackio", "mlflow")
VARIABLE = "MOE_JAX_TRACKER"  # the default of --tracker, which a sweep sets for its runs
_PROJECT = "moe_jax"
_ROOT = pathlib.Path(__file__).parents[2]
_SECONDS = 60.0  # that the end of a run waits for what is not sent yet
_SECONDS_OF_STOP = 10.0  # the same where a scheduler has asked the run to stop
_SAVE_SECONDS = 30.0  # between two notes of what is sent
_OFF = "is off until the next start, and the run goes on"


def check(name: str) -> None:
  """Raises a UserError where the library of --tracker=NAME is not installed."""
  if name and importlib.util.find_spec(name) is None:
    raise UserError(f"--tracker={name}: it is not installed: pip install 'moe_jax[{name}]'")


class Tracker:
  """The process that keeps the record of a run; nothing waits for it before the end."""

  def __init__(self, name: str, workdir: pathlib.Path, *plots: pathlib.Path):
    """Begins the record, or goes on with it; with `plots` these are all that it gets."""
    self._name, self._process = name, None
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    lines = files.growing(workdir / workdir_lib.METRICS)
    words = [name, str(workdir), str(lines), *map(str, plots)]
    try:
      # Signals to the process group are not for it: it ends after the run's last line.
      self._process = subprocess.Popen(
        [sys.executable, "-P", "-m", "moe_jax.training.tracker", *words],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=2,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
      )
    except OSError as error:
      notice(f"--tracker={name} {_OFF}: cannot start a process: {error.strerror}")

  def close(self, stopped: bool = False) -> None:
    """Ends the record, as of a failure while an error is raised; waits for what is unsent.

    Not long if the run is `stopped` by a scheduler, which soon kills it.
    """
    if not self._process:
      return
    said = b"failed" if sys.exc_info()[0] else b"finished"
    seconds = min(_SECONDS, _SECONDS_OF_STOP) if stopped else _SECONDS
    try:
      with progress.waiting(f"{self._name} still has to send what was logged"):
        self._process.communicate(said, seconds)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.communicate()
      notice(f"--tracker={self._name} {_OFF}: not done {seconds:.0f} s after the run, and ended")


def attach_plots(workdir: pathlib.Path) -> None:
  """Adds the plots of a workdir, of an evaluation, to the record of its run, if that has one."""
  if name := workdir_lib.read_object(workdir / workdir_lib.TRACKER).get("tracker"):
    Tracker(name, workdir, *sorted(workdir.glob("*.png"))).close()


def scalars(line: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers of a line of metrics.jsonl; of a list [Z] each as "name/layer".

  A number that is not finite would be drawn nowhere, and is left out.
  """
  found: dict[str, Any] = {}
  for name, value in line.items():
    found |= (
      {f"{name}/{z}": v for z, v in enumerate(value)} if name.endswith("_Z") else {name: value}
    )
  return {n: v for n, v in found.items() if isinstance(v, (int, float)) and math.isfinite(v)}


class Wandb:
  """What the record of each library has: its id, where to see it, and three functions.

  `end` says whether the run has failed, or None where it goes on as it was.
  """

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
    self.id, self.place = record, self._run.url or self._run.settings.sync_dir
    self._image = wandb.Image

  def log(self, step: int, scalars: dict[str, float]) -> None:
    self._run.log(scalars | {"step": step})

  def attach(self, step: int, images: list[pathlib.Path]) -> None:
    self._run.log({"step": step} | {image.stem: self._image(str(image)) for image in images})

  def end(self, failed: bool | None) -> None:
    self._run.finish(exit_code=int(failed or 0))


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

  def end(self, failed: bool | None) -> None:
    self._run.finish()


class Mlflow:
  def __init__(self, name: str, record: str, config: dict[str, Any]):
    import mlflow

    self._mlflow = mlflow
    self.place = shown_place(mlflow.get_tracking_uri())
    self._before = mlflow.get_run(record).info.status if record else "FINISHED"
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

  def end(self, failed: bool | None) -> None:
    self._mlflow.end_run(self._before if failed is None else "FAILED" if failed else "FINISHED")


def shown_place(uri: str) -> str:
  """Returns an address without what can be a secret: a name and a password, and the query."""
  return re.sub(r"(?<=//)[^/@]*@|\?.*", "", uri)


def _parts(values: dict[str, Any]) -> list[dict[str, Any]]:
  """Splits values into the hundred that MLflow takes at once."""
  items = list(values.items())
  return [dict(items[i : i + 100]) for i in range(0, len(items), 100)]


_TRACKERS: dict[str, Any] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


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


def begin(name: str, workdir: pathlib.Path, known: dict[str, Any]) -> Any:
  """Returns the record of a run: the one that is known, or a new one."""
  config = flatten(workdir_lib.read_config(workdir)) | {"commit": commit()}
  for kind, kernel in workdir_lib.read_kernels(workdir).items():
    config[f"kernels.{kind}"] = kernel
  return _TRACKERS[name]("-".join(workdir.parts[-2:]), known.get("id", ""), config)


def follow(
  name: str, workdir: pathlib.Path, lines: pathlib.Path, plots: list[str], out: TextIO
) -> None:
  """Sends the plots; or the lines that are not sent yet, until stdin says how the run has ended."""
  said, ended = _listen()
  known = workdir_lib.read_object(workdir / workdir_lib.TRACKER)
  known = known if known.get("tracker") == name else {}
  record, last, saved = begin(name, workdir, known), known.get("last", []), -math.inf
  if plots:
    with tempfile.TemporaryDirectory() as folder:
      record.attach(last[0] if last else 0, [_copy(plot, folder) for plot in plots])
      record.end(None)
    return
  print(shown(f"--tracker={name}: record {record.id}, {record.place}"), file=out, flush=True)
  rewinds = workdir_lib.rewinds(workdir)
  if len(rewinds) > known.get("rewinds", 0):  # the steps after it are taken with other rows
    last = min(last, [rewinds[-1]["step"], True])
  lines.touch()
  with open(lines) as file:
    over = False
    while not over:
      over = ended.wait(1)
      for line in _whole_lines(file):
        values = json.loads(line)
        # A step's evaluation follows its line. A start takes steps after a checkpoint again.
        place = [values.pop("step"), "validation/loss" in values]
        if place > last:
          record.log(place[0], scalars(values))
          last = place
      if over or time.monotonic() - saved > _SAVE_SECONDS:
        about = {"tracker": name, "id": record.id, "last": last, "rewinds": len(rewinds)}
        workdir_lib.write_object(workdir / workdir_lib.TRACKER, about)
        saved = time.monotonic()
  record.end(said != ["finished"])  # a process that was killed says nothing


def _listen() -> tuple[list[str], threading.Event]:
  """Returns what stdin has said when the event is set; soon after it this process ends."""
  said: list[str] = []
  ended = threading.Event()

  def listen() -> None:
    said.append(sys.stdin.read())
    ended.set()
    time.sleep(_SECONDS)
    os._exit(1)  # also where the library has hung from the beginning

  threading.Thread(target=listen, daemon=True).start()
  return said, ended


def _whole_lines(file: TextIO) -> Iterator[str]:
  """Yields the lines that are complete, and leaves the file at the one that is not."""
  while True:
    place = file.tell()
    if not (line := file.readline()).endswith("\n"):
      file.seek(place)
      return
    yield line


def _copy(plot: str, folder: str) -> pathlib.Path:
  """Returns a copy of a plot, which may be in an object store, on this machine."""
  path = workdir_lib.open_path(plot)
  copy = pathlib.Path(folder, path.name)
  copy.write_bytes(files.read_bytes(path))
  return copy


def main() -> None:
  """Keeps a record; the libraries say nothing on stdout."""
  name, workdir, lines, *plots = sys.argv[1:]
  for number in (signal.SIGINT, signal.SIGTERM):  # of a scheduler, to every process of a job
    signal.signal(number, signal.SIG_IGN)
  out, sys.stdout = sys.stdout, sys.stderr
  try:
    follow(name, workdir_lib.open_path(workdir), pathlib.Path(lines), plots, out)
  except Exception as error:  # whatever a library raises
    print(shown(f"--tracker={name} {_OFF}: {short(error)}"), file=out, flush=True)
    os._exit(1)  # a library could wait for a network


if __name__ == "__main__":
  main()
