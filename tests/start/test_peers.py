"""Processes that watch each other: real ones, without jax, which are killed, stopped, or fail."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.support.toys import ROOT, slow_unless

LOST = "start the same command again on all hosts; training goes on from its last checkpoint"


class Started:
  """Processes number 0, 1, ... with the bodies of tests/support/peer_worker.py; "" starts none."""

  def __init__(
    self, *bodies, timeout=100, patience=100, counts=None, numbers=None, port=None, arguments=None
  ):
    self.port = port or free_port()
    counts, numbers = counts or [len(bodies)] * len(bodies), numbers or list(range(len(bodies)))
    extra = arguments or [[] for _ in bodies]
    self.processes = [
      subprocess.Popen(
        [sys.executable, "-m", "tests.support.peer_worker", str(number), str(count),
         str(self.port), str(timeout), str(patience), body, *more],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      )
      for body, count, number, more in zip(bodies, counts, numbers, extra, strict=True) if body
    ]  # fmt: skip

  def meet(self):
    for process in self.processes:
      assert process.stdout.readline() == "met\n"
    return self

  def name(self, index):
    return f"process {index} ({socket.gethostname()}, pid {self.processes[index].pid})"

  def ends(self, timeout=600):
    """(exit code, stderr) of each, within the time."""
    stderr = [process.communicate(timeout=timeout)[1] for process in self.processes]
    return [(p.returncode, text) for p, text in zip(self.processes, stderr, strict=True)]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.communicate()


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_process_is_named_by_all_others_at_once(lost):
  with Started("wait", "wait", "wait") as run:
    run.meet().processes[lost].kill()
    start = time.monotonic()
    ends = run.ends()
    assert time.monotonic() - start < 50  # a fraction of the time-out
    assert ends.pop(lost) == (-signal.SIGKILL, "")
    assert ends == 2 * [(7, f"error: {run.name(lost)} is gone; {LOST}\n")]


@pytest.mark.parametrize("lost", slow_unless([1], [0, 1]))
def test_a_process_that_hangs_is_lost_after_the_time_out(lost):
  with Started("wait", "wait", timeout=2) as run:
    start = time.monotonic()
    run.meet().processes[lost].send_signal(signal.SIGSTOP)
    other = run.processes[1 - lost]
    assert other.communicate(timeout=600)[1] == (
      f"error: {run.name(lost)} has given no sign of life for --peer_timeout=2 s; {LOST}\n"
    )
    assert other.returncode == 7
    assert 1.5 < time.monotonic() - start < 60
    run.processes[lost].send_signal(signal.SIGCONT)  # it does not go on alone
    assert run.processes[lost].wait(timeout=600) == 7


def test_a_process_that_computes_for_longer_than_the_time_out_is_not_lost():
  with Started("compute", "compute", timeout=2.5) as run:
    assert run.meet().ends() == [(0, ""), (0, "")]


@pytest.mark.parametrize("number", slow_unless([1], [0, 1]))
def test_an_error_of_the_user_ends_all_with_its_code(number):
  bodies = ["wait"] * 3
  bodies[number] = "user_error"
  with Started(*bodies) as run:
    ends = run.ends()
    message = "config.data.path=here: no such file\n"
    assert ends.pop(number) == (2, f"error: {message}")
    assert ends == 2 * [(2, f"error: {run.name(number)} ended with an error: {message}")]


def test_an_exception_of_one_process_ends_the_others_as_if_it_were_lost():
  with Started("wait", "bug") as run:
    (code, line), (own_code, trace) = run.ends()
    assert (code, own_code) == (7, 1)
    assert line == f"error: {run.name(1)} ended with an error: ZeroDivisionError: a bug\n"
    assert trace.startswith("Traceback") and trace.endswith("ZeroDivisionError: a bug\n")


def test_an_interrupted_process_ends_the_others():
  with Started("interrupt", "wait") as run:
    assert run.ends() == [(130, ""), (130, f"error: {run.name(0)} was interrupted\n")]


@pytest.mark.parametrize("first", slow_unless([0], [0, 1]))
def test_a_process_that_is_done_is_not_lost(first):
  bodies = ["nap", "nap"]
  bodies[first] = "leave"
  with Started(*bodies) as run:
    assert run.processes[first].wait(timeout=600) == 0
    assert run.processes[1 - first].poll() is None
    assert run.ends() == [(0, ""), (0, "")]


def test_processes_that_never_start_are_numbered():
  with Started("wait", "", "wait", "", patience=3) as run:
    (code, line), (other_code, other_line) = run.ends()
    assert code == other_code == 7
    assert line.startswith("error: 2 of 4 processes did not start within 3 s: number 1, 3; ")
    assert line.removeprefix("error: ") in other_line and other_line.count("\n") == 1


def test_the_first_process_that_never_starts_is_named_by_its_address():
  with Started("", "wait", patience=2) as run:
    ((code, line),) = run.ends()
    assert code == 7 and line.count("\n") == 1
    assert f"did not find process 0 at JAX_COORDINATOR_ADDRESS=localhost:{run.port}" in line


@pytest.mark.parametrize(
  "options, message",
  [
    ({"counts": [2, 3]}, "has number 1 of JAX_NUM_PROCESSES=3, and process 0"),
    ({"numbers": [0, 1, 1], "counts": [3] * 3}, "has number 1 of JAX_NUM_PROCESSES=3, and process"),
    ({"arguments": [[], ["--config.train.seed=1"]]}, "than process 0: --config.train.seed=1; "),
  ],
)
def test_processes_that_disagree_all_end(options, message):
  with Started(*["wait"] * len(next(iter(options.values()))), **options) as run:
    for code, line in run.ends():
      assert code == 2 and line.count("\n") == 1 and message in line


def test_the_cache_folder_may_be_another_one_on_each_host():
  folders = [[f"--cache_dir={name}"] for name in "ab"]
  with Started("leave", "leave", arguments=folders) as run:
    assert run.ends() == [(0, ""), (0, "")]


def test_a_port_in_use_is_one_line():
  with (
    socket.create_server(("", 0)) as server,
    Started("wait", port=server.getsockname()[1]) as run,
  ):
    ((code, line),) = run.ends()
    assert code == 2
    assert line.startswith(f"error: process 0 cannot listen at port {run.port} (Address already ")


def test_a_stranger_at_the_port_disturbs_nobody():
  with Started("leave", "") as run:
    with pytest.raises((urllib.error.URLError, OSError)):
      ask_until_it_answers(f"http://localhost:{run.port}")
    late = Started("", "leave", port=run.port)
    run.processes += late.processes
    assert run.ends() == [(0, ""), (0, "")]


def ask_until_it_answers(address):
  """Raises the error of a connection that is closed without an answer."""
  while True:
    try:
      urllib.request.urlopen(address, timeout=600)
    except urllib.error.URLError as error:
      if not isinstance(error.reason, ConnectionRefusedError):
        raise
      time.sleep(0.05)
