"""A real Slurm of two nodes on this machine: its controller and two daemons, in a folder.

python -m tests.support.slurm FOLDER starts one, and prints the variable that its commands need.
"""

import contextlib
import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.support.processes import free_ports

_INSTALL = ["apt-get", "install", "-y", "-qq", "slurm-wlm", "munge"]


def installed():
  """Skips the test where there is no Slurm and none can be installed; root may install it."""
  if not shutil.which("slurmctld") and os.geteuid() == 0 and shutil.which("apt-get"):
    subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
    subprocess.run(
      _INSTALL, capture_output=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    )
  if not shutil.which("slurmctld") or not shutil.which("munged"):
    pytest.skip(f"needs Slurm: {' '.join(_INSTALL)}")


class Slurm:
  """A cluster of the nodes n0 and n1, each with both cores of the machine, until `stop`."""

  def __init__(self, folder: pathlib.Path):
    host, (controller, *nodes) = socket.gethostname(), free_ports(3)
    folder.mkdir(parents=True, exist_ok=True)
    key, munge = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    lines = [
      "ClusterName=local", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={controller}",
      f"SlurmUser={getpass.getuser()}", f"SlurmdUser={getpass.getuser()}",
      "AuthType=auth/munge", "CredType=cred/munge",
      # A job that is queued again waits as long as its credential lives: 2 minutes by default.
      f"AuthInfo=socket={munge},cred_expire=5",
      f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool-%n",
      f"SlurmctldPidFile={folder}/controller.pid", f"SlurmdPidFile={folder}/%n.pid",
      f"SlurmctldLogFile={folder}/controller.log", f"SlurmdLogFile={folder}/%n.log",
      "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SwitchType=switch/none",
      "SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU", "MpiDefault=none",
      "JobAcctGatherType=jobacct_gather/none", "AccountingStorageType=accounting_storage/none",
      "SlurmdParameters=config_overrides", "SchedulerParameters=sched_interval=2",
      *(f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=8000"
        for i, port in enumerate(nodes)),
      "PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES",
    ]  # fmt: skip
    config = folder / "slurm.conf"
    config.write_text("\n".join(lines) + "\n")
    (folder / "state").mkdir(exist_ok=True)
    self.folder = folder
    self.environment = {**os.environ, "SLURM_CONF": str(config)}
    daemons = [
      ["munged", "--force", f"--socket={munge}", f"--key-file={key}",
       f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log",
       f"--seed-file={folder}/munge.seed"],
      ["slurmctld", "-f", config], ["slurmd", "-f", config, "-N", "n0"],
      ["slurmd", "-f", config, "-N", "n1"],
    ]  # fmt: skip
    for command in daemons:
      subprocess.run(command, env=self.environment, check=True, capture_output=True)
    self.until(lambda: self.call("sinfo", "-h", "-o", "%D %t") == "2 idle")

  def call(self, *command, **options):
    """Returns what a command of Slurm prints."""
    how = {"env": self.environment, "capture_output": True, "text": True, "check": True}
    return subprocess.run([str(word) for word in command], **how | options).stdout.strip()

  def queued(self, job):
    """Returns the state of a job, as RUNNING; "" where it has left the queue."""
    said = subprocess.run(
      ["squeue", "-h", "-j", str(job), "-o", "%T"],
      env=self.environment,
      capture_output=True,
      text=True,
    )
    return said.stdout.strip()

  @staticmethod
  def until(holds, seconds=400):
    """Waits until something holds, and returns it."""
    end = time.monotonic() + seconds
    while not (found := holds()):
      assert time.monotonic() < end, "it did not happen"
      time.sleep(0.25)
    return found

  def stop(self):
    for name in ("n0", "n1", "controller", "munge"):
      with contextlib.suppress(OSError, ValueError):
        os.kill(int((self.folder / f"{name}.pid").read_text()), 9)


if __name__ == "__main__":
  print(f"export SLURM_CONF={Slurm(pathlib.Path(sys.argv[1])).environment['SLURM_CONF']}")
