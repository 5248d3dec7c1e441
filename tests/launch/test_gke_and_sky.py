"""The launch files for GKE and SkyPilot, read by the real tools, and their scripts really run."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import yaml

from tests.support.processes import Together, free_ports, train_command
from tests.support.toys import ROOT

pytestmark = pytest.mark.slow
JOBSET = ROOT / "launch/xpk_jobset.yaml"
# Nothing is saved before the signal.
LONG = ["--config.train.steps=100000", "--config.train.checkpoint_every=100000"]
# The lines of launch/sky.yaml that a person takes away, and those that come in their place.
VARIANTS = {
  "gcp": ((), ()),
  "slurm": (("infra: gcp", "accelerators: tpu"), ("infra: slurm", "accelerators: H100")),
  "ssh": (("infra: gcp", "accelerators: tpu"), ("infra: ssh", "accelerators: H100")),
}
# Reads a task as SkyPilot's client does, and writes its script as SkyPilot's runtime does.
READ = """
import json, sys
import sky
from sky.skylet import log_lib
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
envs = task.envs | json.loads(sys.argv[2])
script = log_lib.make_task_bash_script(task.run, envs)
said = [str(resources.cloud), resources.accelerators, resources.job_recovery, task.num_nodes]
print(json.dumps([*said, script]))
"""


def tool(name):
  """The path of a program in .venv-launch, or of the user's own."""
  path = shutil.which(name, path=f"{ROOT}/.venv-launch/bin:{os.environ['PATH']}")
  if path is None:
    pytest.skip(f"{name} is not installed: make test-launchers")
  return pathlib.Path(path)


def edited(path, *changes):
  """Writes a launch file as a person who has edited it; returns its path."""
  text = (ROOT / "launch" / path.name).read_text()
  for pattern, new in changes:
    text, count = re.subn(pattern, new.replace("\\", "\\\\"), text, flags=re.M | re.S)
    assert count == 1, pattern
  path.parent.mkdir(exist_ok=True)
  path.write_text(text)
  return path


def rendered(tmp_path, script=ROOT / "launch/xpk.sh", *arguments):
  """The JobSet that XPK would send to GKE, as text without its blank lines."""
  environment = os.environ | {
    "PATH": f"{tool('xpk').parent}:{os.environ['PATH']}",
    "HOME": str(tmp_path),
    "TELEMETRY_ENABLED": "false",
  }
  to = tmp_path / "jobset.yaml"
  command = ["bash", script, "--dry-run", f"--output-manifest-file={to}", *arguments]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "kubectl apply -f" in done.stdout
  return [line.rstrip() for line in to.read_text().splitlines() if line.strip()]


def pod(jobset):
  """Its template of jobs, and its one container."""
  (job,) = jobset["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  return job["template"]["spec"], container


def test_xpk_renders_the_jobset_that_is_shown(tmp_path):
  shown = [line for line in JOBSET.read_text().splitlines() if not line.startswith("#")]
  assert rendered(tmp_path) == shown


def test_the_jobset_has_the_command_the_chips_and_the_restarts(tmp_path):
  """As docs/reliability.md sorts the exit codes; and further arguments reach XPK."""
  jobset = yaml.safe_load("\n".join(rendered(tmp_path, ROOT / "launch/xpk.sh", "--num-slices=2")))
  assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 50
  job, container = pod(jobset)
  hosts, chips = job["parallelism"], container["resources"]["limits"]["google.com/tpu"]
  assert (hosts, chips) == (16, 4)
  command = r"python train\.py --config=\S+ --workdir=gs://.* --multihost"
  assert re.search(command, container["command"][2])
  (rule,) = job["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
  restarted = set(rule["onExitCodes"]["values"])
  assert {3, 7, 134, 137, 139, 143} <= restarted and not {1, 2, 4, 5, 6} & restarted


def test_a_rehearsal_is_train_py_here(tmp_path):
  """A number that is none is refused before anything starts, by train.py and not by XPK."""
  environment = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
  command = ["bash", "launch/xpk.sh", "--rehearse=none"]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 2 and "--rehearse" in done.stderr, done


@contextlib.contextmanager
def scripts(command, environments=({}, {})):
  """Two processes of a script; at the end nothing is left of them, whatever the script did."""
  with Together(["setsid", *command], environments) as two:
    try:
      yield two
    finally:
      for process in two.processes:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)


def codes(two):
  return [code for code, *_ in two.ends(timeout=150)]


def test_a_preempted_pod_asks_for_a_restart_and_the_others_have_saved(tmp_path, cache, monkeypatch):
  """The very script of the container in two processes, without its cluster."""
  monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")

  def container(*fields):
    arguments = "\n".join(train_command(tmp_path / "run", cache, *fields)[2:])
    script = edited(
      tmp_path / "launch/xpk.sh",
      (r"^INSTALL=.*?$", "INSTALL=true"),
      (r"^ARGUMENTS=\(.*?^\)", f"ARGUMENTS=(\n{arguments}\n)"),
    )
    return pod(yaml.safe_load("\n".join(rendered(tmp_path, script))))[1]["command"]

  with scripts(container(*LONG)) as two:
    two.until("step ")
    two.processes[1].send_signal(signal.SIGTERM)
    assert codes(two) == [0, 143]
  (step,) = (int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
  with scripts(container(f"--config.train.steps={step + 2}")) as two:
    (code, output, _), (other, *_) = two.ends()
  assert (code, other) == (0, 0) and f"step {step + 2:6}/{step + 2}" in output, output
  with scripts(container("--config.train.steps=-1")) as two:
    assert codes(two) == [2, 2]


def read(tmp_path, variant, envs=(), *changes):
  """What SkyPilot makes of a variant: cloud, accelerators, recovery, machines, and its script."""
  away, put = VARIANTS[variant]
  changes = [*changes, *((rf"^  {line}", f"  # {line}") for line in away)]
  changes += [(rf"^  # {line}", f"  {line}") for line in put]
  path = edited(tmp_path / "sky.yaml", *changes)
  done = subprocess.run(
    [tool("sky").parent / "python", "-c", READ, path, json.dumps(dict(envs))],
    env=os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
  ("variant", "cloud", "accelerators"),
  [
    ("gcp", "GCP", {"tpu-v5p-128": 1}),
    ("slurm", "Slurm", {"H100": 8}),
    ("ssh", "SSH", {"H100": 8}),
  ],
)
def test_skypilot_reads_each_variant(tmp_path, variant, cloud, accelerators):
  *said, _ = read(tmp_path, variant)
  recovery = {"strategy": "FAILOVER", "max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
  assert said == [cloud, accelerators, recovery, 1]


def test_skypilots_script_is_two_processes_and_says_what_a_restart_mends(tmp_path, cache):
  """A signal, a killed process and a mistake; then the run goes on to its end."""
  folder = tmp_path / "sky_workdir"
  (folder / ".venv/bin").mkdir(parents=True)
  for name in ("train.py", "configs"):
    (folder / name).symlink_to(ROOT / name)
  (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
  (folder / ".venv/bin/python").chmod(0o755)

  def machines(*fields):
    config, run, *arguments = train_command(tmp_path / "run", cache, *fields)[2:]
    envs = {
      "CONFIG": config.removeprefix("--config="),
      "RUN": run.removeprefix("--workdir="),
      "ARGUMENTS": " ".join(arguments),
    }
    (port,) = free_ports(1)
    script = tmp_path / "script.sh"
    changes = (":12345", f":{port}"), ("sleep 30", "sleep 1")
    script.write_text(read(tmp_path, "ssh", envs, *changes)[-1])
    each = [
      {
        "HOME": str(tmp_path),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "JAX_COORDINATOR_ADDRESS": "the script's to set",
        "JAX_NUM_PROCESSES": "",
        "JAX_PROCESS_ID": "",
      }
      for rank in (0, 1)
    ]
    return scripts(["bash", "-i", script], each)  # as SkyPilot does, without a terminal

  with machines(*LONG) as two:
    two.until("step ")
    two.processes[1].send_signal(signal.SIGTERM)
    assert codes(two) == [0, 75]
  (step,) = (int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
  with machines(*LONG) as two:
    two.until("step ")
    (python,) = psutil.Process(two.processes[0].pid).children()
    python.kill()
    assert [process.wait(timeout=100) for process in two.processes] == [75, 75]
  with machines("--config.train.steps=-1") as two:
    assert codes(two) == [2, 2]
  with machines(f"--config.train.steps={step + 2}") as two:
    (code, output, _), (other, *_) = two.ends()
  assert (code, other) == (0, 0) and f"step {step + 2:6}/{step + 2}" in output, output
