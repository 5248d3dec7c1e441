"""Settings that must be made before jax starts: processes, simulated devices, compiled programs."""

import contextlib
import ctypes
import os
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.config import Config
from moe_jax.errors import UserError, few
from moe_jax.start import command_line, flags
from moe_jax.storage import cache

_MOMENT = 3.0  # seconds in which the same mistake in all processes becomes a line of each of them


def start(config: Config | None = None) -> None:
  """Makes the settings, with the flags of the chips for a run. Before the first jax computation."""
  if config is not None:
    flags.set_flags(config, flags.chip_here())
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
def together(
  multihost: bool, timeout: int, config: Config, *, saves: bool = False
) -> Iterator[None]:
  """Runs the body as one of several processes, if `multihost`.

  Process 0 alone has a stdout. Where a process ends before its body does, jax aborts the others:
  at once if it was process 0, else when its heartbeat has been missing for `timeout`.

  Args:
    multihost: whether to join the other processes. jax finds them itself on a TPU pod and under
      SLURM; elsewhere the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
      JAX_PROCESS_ID name them.
    timeout: seconds without a heartbeat after which a process is lost. All have to start within
      five times as long.
    config: of the run, whose flags are set.
    saves: whether the body saves and stops when SIGTERM comes (Checkpointer.reached_preemption);
      otherwise SIGTERM ends the process at once, and so all of them.

  Raises:
    UserError: nothing says who the processes are, or they cannot meet.
  """
  if not multihost:
    yield
    return
  address, count, index = place()
  sys.stdout.flush()
  stdout = os.dup(1)
  os.dup2(2, 1)  # what libraries print on stdout, as gloo does
  jax.config.update("jax_enable_preemption_service", saves)
  try:
    jax.distributed.initialize(
      address, count, index, initialization_timeout=5 * timeout, heartbeat_timeout_seconds=timeout
    )
  except ValueError as error:  # jax does not know either, or numbers are too large
    raise UserError(
      f"--multihost: {error} Set JAX_COORDINATOR_ADDRESS ({address}), JAX_NUM_PROCESSES ({count}) "
      f"and JAX_PROCESS_ID ({index}) on every host, or leave --multihost out for one process"
    ) from None
  try:
    start(config)
    if jax.process_index():
      stdout = os.open(os.devnull, os.O_WRONLY)
    sys.stdout = open(stdout, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 (to the end)
    _check_same_arguments()
    yield
    jax.distributed.shutdown()  # waits for the others, which may still be writing
  except BaseException as error:
    _end(error, timeout)


def place() -> tuple[str | None, int | None, int | None]:
  """Returns the coordinator's address, how many processes there are, and the number of this one.

  None stands for what the environment does not say, which jax may know.
  """
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  numbers: list[Any] = []
  for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
      raise UserError(f"{name}={text}: write a whole number, as in {name}=1")
    numbers.append(text if text is None else int(text))
  count, index = numbers
  host, _, port = (address or "jax:0").rpartition(":")
  if not host or not port.isdecimal() or int(port) > 65535:
    raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: write HOST:PORT, as in host0:12345")
  if address and index == 0:
    port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address).rpartition(":")[2]
    try:
      socket.create_server(("", int(port))).close()
    except OSError as error:  # at which jax would crash
      raise UserError(
        f"process 0 cannot listen at port {port} ({os.strerror(error.errno or 0)}): end the process"
        " that has it, perhaps of an earlier start, or choose another in JAX_COORDINATOR_ADDRESS"
      ) from None
  return address, count, index


def _check_same_arguments() -> None:
  """Raises a UserError in all processes if their command lines differ, but for a local folder."""
  words = [word for word in sys.argv[1:] if not word.startswith("--cache_dir")]
  digest = np.uint32(zlib.crc32("\0".join(words).encode()))
  digests = multihost_utils.process_allgather(digest)
  if other := np.flatnonzero(digests != digests[0]).tolist():
    raise UserError(
      f"--multihost: process {few(other)} was started with other arguments than process 0; start "
      "the same command on all hosts"
    )


def let_others_speak() -> None:
  """Waits in process 0, whose end ends the others, until each has printed a line of its own."""
  time.sleep(0 if jax.process_index() else _MOMENT)


def _end(error: BaseException, timeout: int) -> NoReturn:
  """Prints an error and ends this process, which at a usual end would wait for the others."""

  def again() -> None:
    raise error

  code = 1
  try:
    command_line.one_line_errors(again, sys.exit)
  except SystemExit as end:
    code = int(end.code or 0)
    let_others_speak()
  except BaseException:
    traceback.print_exc()
    time.sleep(timeout + _MOMENT)  # where a lost process is the reason, jax aborts this one
  os._exit(code)


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
