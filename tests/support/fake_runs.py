"""A folder with a train.py and an eval.py that need no jax, for the tests of sweeps."""

import contextlib
import io
import json
import pathlib
import textwrap
from typing import NamedTuple

import pytest

from moe_jax.report import page
from moe_jax.sweep import runner
from tests.support.sweeps import write_sweep
from tests.support.toys import ROOT

FAKE_TRAIN = """
  import json, pathlib, signal, sys, time
  words = dict(word.split("=", 1) for word in sys.argv[1:])
  workdir, steps = pathlib.Path(words["--workdir"]), int(words.get("--config.train.steps", 30))
  told = []
  extra = pathlib.Path(f"{workdir.parent.name}.py")  # what this arm does besides
  if extra.exists():
    exec(extra.read_text())
  signal.signal(signal.SIGTERM, lambda *_: told.append(1))
  if "--config.loss.z" in words:
    sys.exit("error: z is broken")
  newest = workdir / "newest"
  start = int(newest.read_text()) if newest.exists() else 0
  print(f"resuming at step {start}" if start else "new")
  for step in range(start + 1, steps + 1):
    print(f"step {step:>6}/{steps}  loss 1.0000  9.00 steps/s  ETA 0:00:01", flush=True)
    newest.write_text(str(step))
    deadline = time.time() + 600
    while step == 5 and pathlib.Path("slow").exists() and not told and time.time() < deadline:
      time.sleep(0.02)
    told += [1] * (step == 7 and "--config.loss.router_z" in words)
    if told:
      print(f"SIGTERM: saved step {step}")
      sys.exit(0)
  (workdir / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
"""
FAKE_EVAL = """
  import json, pathlib, sys
  workdir = pathlib.Path(sys.argv[1].partition("=")[2])
  step = int((workdir / "newest").read_text())
  (workdir / "eval.json").write_text(json.dumps({"step": step, "loss": 1.5}))
  print("evaluated", *sys.argv[2:])
"""


class Swept(NamedTuple):
  """What a sweep left: its code, record and output, and the logs of its runs."""

  code: int
  record: dict
  output: str
  logs: dict[str, str]  # by arm

  @property
  def statuses(self):
    return {run["arm"]: run["status"] for run in self.record["runs"]}


class Fakes:
  """A folder with a train.py and an eval.py that need no jax."""

  def __init__(self, folder):
    for name, text in (("train", FAKE_TRAIN), ("eval", FAKE_EVAL)):
      (folder / f"{name}.py").write_text(textwrap.dedent(text))
    (folder / "configs").mkdir()
    (folder / "configs/debug.py").write_text((ROOT / "configs/debug.py").read_text())
    self.folder, self.reports = folder, []

  def report(self, out):
    self.reports.append(out)
    return page.Report(out / "report.html", [], 0)

  def sweep(self, arms, jobs=1, overrides=None, names=(), **more):
    path = write_sweep(self.folder, arms, seeds=(0,), **more)
    with contextlib.redirect_stdout(io.StringIO()) as output:
      code = runner.run_sweep(
        path,
        pathlib.Path("out"),
        jobs=jobs,
        dry_run=False,
        arms=names,
        seeds=[],
        overrides=overrides or {},
      )
    record = json.loads(pathlib.Path("out/sweep.json").read_text())
    logs = {
      log.parent.parent.name: log.read_text(errors="replace")
      for log in pathlib.Path("out").rglob("log.txt")
    }
    return Swept(code, record, output.getvalue(), logs)


@contextlib.contextmanager
def fakes_in(folder):
  """While it lasts, the fakes' folder is the current one, and reports are only noted down."""
  made = Fakes(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setattr(page, "compare", made.report)
    yield made
