"""Settings that must be made before jax starts: processes, simulated devices, compiled programs."""

import contextlib
import ctypes
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import clusters
from jax.extend import backend

from moe_jax.data import cache
from moe_jax.errors import UserError
from moe_jax.start import peers

_KEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler sends it to all processes
sys.stdin.read()  # until the other end closes
time.sleep(10)
"""


def start() -> None:
  """Makes the settings. To be called once, before the first jax computation."""
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    # A collective of simulated devices needs a thread for each of them, or it waits for ever.
    os.environ.setdefault("PJRT_NPROC", "32")
  _keep_freed_memory()
  programs = cache.programs()
  if programs is not None:
    jax.config.update("jax_compilation_cache_dir", str(programs))
    # A start has ten programs, of which most compile in less than the second that jax waits for.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


@contextlib.contextmanager
def together(multihost: bool, timeout: float, *, saves: bool = False) -> Iterator[None]:
  """Runs the body as one of several processes, if `multihost`. To be entered before `start`.

  Process 0 alone has a stdout. If a process is lost or fails, all end (moe_jax.start.peers).

  Args:
    multihost: whether to join the other processes. jax finds them itself on a TPU pod and under
      SLURM; elsewhere the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
      JAX_PROCESS_ID name them.
    timeout: seconds without a sign of life after which a process is lost. All have to start within
      five times as long.
    saves: whether the body saves and stops when SIGTERM comes (Checkpointer.reached_preemption);
      otherwise SIGTERM ends the process at once, and so all of them.

  Raises:
    UserError: nothing says who the processes are.
  """
  if not multihost:
    yield
    return
  address, count, index = place()
  processes = peers.Processes(index, count, timeout, patience=5 * timeout)
  try:
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address
    processes.meet(address, int(bind.rpartition(":")[2]))
    _leave_stdout_to_process_0(index)
    jax.config.update("jax_enable_preemption_service", saves)
    before = _connections()
    # jax's own time-out is the longer one: it aborts with a dump of the C++ stack.
    jax.distributed.initialize(
      address, count, index, heartbeat_timeout_seconds=int(max(100, 2 * timeout))
    )
    keeper = None if index else _keep(_connections() - before)
    yield
    backend.clear_backends()  # before the shutdown, as jax does it at exit
    jax.distributed.shutdown()  # waits for the others, which may still be writing
    if keeper:
      keeper.kill()
      keeper.wait()
    processes.leave()
  except BaseException as error:
    processes.fail(error)


def place() -> tuple[str, int, int]:
  """Returns the coordinator's address, the number of processes, and the number of this one."""
  values: list[Any] = [os.environ.get("JAX_COORDINATOR_ADDRESS")]
  for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
      raise UserError(f"{name}={text}: write a whole number, as in {name}=1")
    values.append(text if text is None else int(text))
  if None in values:  # jax knows the environment of TPU pods, SLURM and Open MPI
    address, count, index = values
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    values[:] = detect(address, count, index, None, None, 300)[:3]
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  missing = [name for name, value in zip(names, values, strict=True) if value is None]
  if missing:
    raise UserError(
      f"--multihost: {' and '.join(missing)} not set, and this is no TPU pod and no SLURM job that "
      "says it; set it on every host, or leave --multihost out for one process"
    )
  address, count, index = values
  if index >= count:
    raise UserError(
      f"JAX_PROCESS_ID={index}: the JAX_NUM_PROCESSES={count} processes have numbers from 0 on, so "
      f"{count - 1} is the last"
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or int(port) > 65535:
    raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: write HOST:PORT, as in host0:12345")
  return address, count, index


def _leave_stdout_to_process_0(index: int) -> None:
  """Also sends to stderr what libraries print on stdout, as gloo does."""
  sys.stdout.flush()
  kept = os.open(os.devnull, os.O_WRONLY) if index else os.dup(1)
  os.dup2(2, 1)
  sys.stdout = open(kept, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 (to the end)


def _connections() -> set[int]:
  """Returns the descriptors of connections to other processes; none on a system without /proc."""
  found = set()
  for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
    with contextlib.suppress(OSError):  # closed already, or a socket that only listens
      if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
        with socket.socket(fileno=os.dup(int(name))) as copy:
          copy.getpeername()
          found.add(int(name))
  return found


def _keep(connections: set[int]) -> "subprocess.Popen[bytes]":
  """Keeps connections open for some seconds after the end of this process, however it ends.

  jax aborts a process whose connection to process 0 closes, with a dump of the C++ stack and before
  the process can say what happened. Returns the process that keeps them.
  """
  return subprocess.Popen(
    [sys.executable, "-I", "-c", _KEEPER],
    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    pass_fds=connections, start_new_session=True,
  )  # fmt: skip


def _keep_freed_memory() -> None:
  """Lets the C library keep the memory of freed arrays, which the next step then uses again.

  By default it returns large arrays to the system and asks for them again in the next step, and a
  thread cannot use what another has freed. On a CPU, page faults then take 10 to 20% of a training
  step. Only glibc has the settings; elsewhere nothing is done.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    libc.mallopt(-4, 0)  # M_MMAP_MAX: a large array is no memory mapping of its own
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: freed memory is not returned to the system
    libc.mallopt(-8, 1)  # M_ARENA_MAX: all threads share one heap
