"""launch/slurm.sbatch and sweep.py on a real Slurm of two nodes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from tests.support import slurm as slurm_lib
from tests.support.disks import fill, small_disk
from tests.support.processes import (
  EVERY_THREAD,
  Together,
  alone,
  assert_equal_values,
  free_ports,
  numbers,
  stop_main_thread,
  train_command,
)
from tests.support.scripts import ONE_DEVICE, result_of
from tests.support.sweeps import write_sweep
from tests.support.toys import ROOT

pytestmark = pytest.mark.slow

STEPS = 150
OFTEN = ["--config.train.eval_every=40", "--config.train.checkpoint_every=40",
         "--config.eval.batches=40", f"--config.train.steps={STEPS}"]  # fmt: skip
ENDLESS = [f"--config.train.{name}=1000000" for name in ("steps", "eval_every", "checkpoint_every")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  slurm_lib.installed()
  cluster = slurm_lib.Slurm(tmp_path_factory.mktemp("slurm"))
  yield cluster
  cluster.stop()


@pytest.fixture
def tree(tmp_path):
  """A clone whose launch files are edited for two small nodes."""
  for name in ("train.py", "eval.py", "sweep.py", "configs", "moe_jax"):
    (tmp_path / name).symlink_to(ROOT / name)
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  toys = {
    "--nodes=8": "--nodes=2", "--ntasks-per-node=8": "--ntasks-per-node=1",
    "#SBATCH --gpus-per-node=8\n": "", "#SBATCH --gpus-per-task=1\n": "",
    "--cpus-per-task=12": "--cpus-per-task=1", "--mem=0": "--mem=100",
    "(.venv/bin/python)": f"({sys.executable})",
  }  # fmt: skip
  files = [*(tmp_path / "launch").glob("*.sbatch")]
  assert all(any(large in file.read_text() for file in files) for large in toys)
  for file in files:
    text = file.read_text()
    for large, small in toys.items():
      text = text.replace(large, small)
    file.write_text(text)
  return tmp_path


class Submitted:
  """A job of launch/slurm.sbatch that trains configs/debug.py, and its log."""

  def __init__(self, cluster, tree, cache, *arguments, options=(), workdir="run", **environment):
    self.cluster, self.workdir, self.log = cluster, tree / workdir, tree / "job.log"
    command = [x for x in train_command(self.workdir, cache, *arguments) if "expert" not in x]
    file = tree / "launch/slurm.sbatch"
    words = " ".join([*command[2:], "--config.mesh.expert=2", "--heartbeat_timeout=10"])
    file.write_text(re.sub(r"^TRAIN=.*", f"TRAIN=({words})", file.read_text(), flags=re.M))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    env = {**alone(1), **environment, "JAX_COORDINATOR_ADDRESS": address}
    env["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    submit = ["sbatch", "--parsable", f"--output={self.log}", *options, file]
    self.job = cluster.call(*submit, cwd=tree, env=env)

  def text(self):
    return self.log.read_text(errors="replace") if self.log.exists() else ""

  def until(self, line):
    """Waits for a line of the log, given as a pattern."""
    self.cluster.until(lambda: re.search(line, self.text(), re.M) or self.gone(line))

  def gone(self, line):
    assert self.cluster.queued(self.job), f"{line} is not in:\n{self.text()}"

  def requeue(self):
    self.cluster.call("scontrol", "requeue", self.job)

  def task(self, number):
    """Returns the process of a task's training."""
    (found,) = (
      process
      for process in psutil.process_iter(["cmdline"])
      if f"--workdir={self.workdir}" in (process.info["cmdline"] or [])
      and "train.py" in process.info["cmdline"]
      and process.environ().get("SLURM_PROCID") == str(number)
    )
    return found

  def ends(self):
    """Returns the exit code of the job and how often it was queued again, when it is over."""
    self.cluster.until(lambda: not self.cluster.queued(self.job), 400)
    said = self.cluster.call("scontrol", "show", "job", self.job)
    code, restarts = (re.search(rf"{name}=(\d+)", said)[1] for name in ("ExitCode", "Restarts"))
    return int(code), int(restarts)


@pytest.mark.parametrize("job", [{}, {"SLURM_JOB_ID": "1"}])
def test_a_rehearsal_is_the_command_itself(job, tree):
  """On the machine where the job is written, and in an interactive job, as of salloc."""
  (tree / "train.py").unlink()
  (tree / "train.py").write_text("import sys; print(sys.argv[1:])")
  command = ["bash", "launch/slurm.sbatch", "--rehearse=2"]
  done = subprocess.run(
    command, cwd=tree, env={**os.environ, **job}, capture_output=True, text=True
  )
  assert done.stdout.endswith("mixtral_8x7b', '--multihost', '--rehearse=2']\n"), done


ARRAY = """#!/bin/bash
#SBATCH --open-mode=append --requeue --output=%a.log
source launch/requeue.sh
echo start
said=(true "echo 'saved step 5; the same command resumes the run'" "kill -9 0")
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || said=(false true true)
run $SLURM_ARRAY_TASK_ID.log srun bash -c "${said[$SLURM_ARRAY_TASK_ID]}"
echo done
"""


def test_a_task_of_an_array_is_queued_again_alone(cluster, tree):
  """Where it was stopped with code 0, or killed; the last task has the number of the array."""
  (tree / "array.sh").write_text(ARRAY)
  job = cluster.call("sbatch", "--parsable", "--array=0-2", "array.sh", cwd=tree)
  cluster.until(lambda: not cluster.queued(job))
  starts = [(tree / f"{task}.log").read_text().count("start\n") for task in range(3)]
  assert starts == [1, 2, 2]
  assert all((tree / f"{task}.log").read_text().endswith("done\n") for task in range(3))


def test_two_nodes_train_as_one_process(cluster, tree, cache):
  options = ["--config.train.steps=6"]
  job = Submitted(cluster, tree, cache, *options)
  assert job.ends() == (0, 0), job.text()
  command = train_command(tree / "one", cache, *options)
  subprocess.run(command, cwd=ROOT, env=alone(2), check=True, stdout=subprocess.DEVNULL)
  assert_equal_values(numbers(tree / "run"), numbers(tree / "one"))


def test_a_run_that_is_requeued_and_killed_ends_as_one_that_is_not(cluster, tree, cache):
  """In the middle of training, of a save and of an evaluation; and a task is killed."""
  job = Submitted(cluster, tree, cache, *OFTEN)
  job.until(r"^step +15/")
  job.requeue()
  job.until(r"^resuming \S+ at step (1[5-9]|2\d|3\d)$")
  cluster.until(lambda: [*job.workdir.glob("checkpoints/*tmp*")])
  job.requeue()
  job.until(r"^resuming [^$]*^step +79/")  # the evaluation of step 80 takes a second
  job.requeue()
  job.until(r"^step +100/")
  job.task(1).kill()
  job.until(r"^launch: start 3 of job \d+ ended with code 1(34|37) at step 1")
  code, restarts = job.ends()
  assert (code, restarts) == (0, 4), job.text()
  with Together(train_command(tree / "undisturbed", cache, *OFTEN)) as two:
    assert [end[0] for end in two.ends()] == [0, 0]
  assert numbers(tree / "run") == numbers(tree / "undisturbed")


def test_a_mistake_is_not_restarted(cluster, tree, cache):
  job = Submitted(cluster, tree, cache, "--config.train.stepz=6")
  assert job.ends() == (2, 0), job.text()
  assert "error: --config.train.stepz=6" in job.text()
  assert "launch: not queued again, since the same command would end in the same way" in job.text()


def test_a_full_disk_is_tried_again_a_few_times_and_goes_on_where_there_is_room(
  cluster, tree, cache
):
  with small_disk(tree / "disk", "8m") as disk:
    filler = fill(disk)
    job = Submitted(cluster, tree, cache, "--config.train.steps=6", workdir="disk/run", TRIES="2")
    code, restarts = job.ends()  # 3 of the one that writes, 134 of the other
    assert (code in (3, 134), restarts) == (True, 1), job.text()
    assert "run/train.lock: No space left on device" in job.text()
    assert "launch: not queued again, since 2 starts have ended at step 0" in job.text()
    job.log.unlink()
    job = Submitted(cluster, tree, cache, "--config.train.steps=6", workdir="disk/run")
    job.until(r"^launch: start 0 of job \d+ ended with code (3|134) at step 0")
    filler.unlink()
    assert job.ends() == (0, 1), job.text()


def test_a_run_saves_before_its_time_is_over_and_goes_on_in_the_next_start(cluster, tree, cache):
  options = ["--time=3", "--signal=B:USR1@60"]  # one or two minutes after the start
  job = Submitted(cluster, tree, cache, *ENDLESS, options=options)
  job.until("^preemption: saved step (\\d+); the same command resumes the run there")
  job.until(r"^launch: start 0 of job \d+ ended with code 0 by time at step ")
  (step,) = re.findall("^preemption: saved step (\\d+)", job.text(), re.M)
  job.until(f"^resuming .* at step {step}$")
  cluster.call("scancel", job.job)
  job.cluster.until(lambda: not cluster.queued(job.job))
  assert "scontrol: error" not in job.text()


def test_a_run_that_hangs_is_restarted(cluster, tree, cache):
  job = Submitted(cluster, tree, cache, *ENDLESS, "--config.train.step_timeout=5")
  job.until("^step +3/")
  task = job.task(1)
  stop_main_thread(task.pid)
  job.until(r"^error: step \d+ has not ended within config.train.step_timeout=5 seconds; process ")
  os.waitpid(task.pid, EVERY_THREAD)  # this process traces it, and is told before Slurm is
  job.until(r"^launch: start 0 of job \d+ ended with code (7|134) at step ")
  cluster.until(lambda: "Restarts=1" in cluster.call("scontrol", "show", "job", job.job))
  cluster.call("scancel", job.job)
  cluster.until(lambda: not cluster.queued(job.job))


def test_a_sweep_on_slurm_is_that_of_one_machine(cluster, tree, cache):
  """With an arm that fails, an end of the sweep's process, one of a task by somebody else, and
  variables of the user that change what squeue says."""
  arms = (
    "[arm('first', {'train.steps': 40}), arm('second', {'train.steps': 40, 'optimizer.b2': 0.9}),"
    " arm('diverges', {'optimizer.learning_rate': 1e30})]"
  )
  path = write_sweep(tree, arms, seeds=(0, 1))
  env = ONE_DEVICE | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
  env |= {"SLURM_TIME_FORMAT": "relative", "SQUEUE_STATES": "PENDING"}  # a user's own

  def sweep(out, *options):
    command = [sys.executable, "sweep.py", f"--sweep={path}", f"--out={out}", *options]
    return subprocess.Popen(command, cwd=tree, env=env, text=True, stdout=subprocess.PIPE)

  def whole(*command):
    process = sweep(*command)
    return process.communicate()[0], process.returncode

  slurm = ["there", "--launcher=slurm", "--slots=2"]
  first = sweep(*slurm)
  while "begins: " not in first.stdout.readline():
    assert first.poll() is None
  first.send_signal(signal.SIGTERM)
  said = first.communicate()[0]
  assert first.returncode == 128 + signal.SIGTERM
  assert "the runs stay in Slurm's queue; `scancel --name=there-" in said
  tasks = cluster.call("squeue", "-h", "--array", "-o", "%i %T").splitlines()
  assert len(tasks) == 6 and sum(task.endswith("RUNNING") for task in tasks) == 2
  assert whole(*slurm, "--config.train.log_every=2")[1] == 2  # they are queued with another command
  cluster.call("scancel", next(task.split()[0] for task in tasks if "PENDING" in task))
  said, code = whole(*slurm)
  assert code == 1 and said.count(" FAILED: ") == 2 and not cluster.call("squeue", "-h")
  assert whole("here", "--jobs=2")[1] == 1
  records = [json.loads((tree / out / "sweep.json").read_text()) for out in ("there", "here")]
  assert_equal_values(*([(r["arm"], r["seed"], r["status"]) for r in x["runs"]] for x in records))
  for arm in ("first", "second"):
    for seed in (0, 1):
      there, here = (tree / out / arm / f"seed{seed}" for out in ("there", "here"))
      assert numbers(there) == numbers(here)
      assert result_of(there)["loss"] == result_of(here)["loss"]
  reports = [(tree / out / "report.md").read_text() for out in ("there", "here")]
  assert all("3 arms, 6 runs: 4 finished, 2 failed." in report for report in reports)
