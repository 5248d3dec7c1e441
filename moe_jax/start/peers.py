"""The processes of one run watch each other, and end together.

Every process has a connection to process 0. One that ends, however it ends, closes its connection;
one that hangs is silent on it. Process 0 tells the others, and all end with one line. jax alone
would leave them waiting in a collective for minutes. Imports no jax.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from moe_jax.errors import PeerError, UserError, shown
from moe_jax.start import command_line

# Seconds between two things that belong together: the loss of a peer and the error of a collective,
# or the same mistake in all processes, each of which then says it itself.
_MOMENT = 2.0
_FAREWELL = 5.0  # seconds that an ending process waits for the others to have heard of it
_INTERRUPTED = 130  # the exit code, as of a shell
_AGAIN = "start the same command again on all hosts; training goes on from its last checkpoint"
# What reading raises that is not from a process of this run, or no longer.
_NO_MESSAGE = (OSError, EOFError, ValueError, KeyError, TypeError)


class _Peer:
  """A connection to another process. A message is a line of JSON; {} is a sign of life."""

  def __init__(self, connection: socket.socket, timeout: float):
    connection.settimeout(timeout)
    self.connection, self.lines = connection, connection.makefile("rb")
    self.name = ""
    self.heard_all = threading.Event()  # the peer has said its last word, or has none left

  def send(self, **message: Any) -> None:
    with contextlib.suppress(OSError):  # a peer that is lost is noticed where it is read
      self.connection.sendall(json.dumps(message).encode() + b"\n")

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self.connection.shutdown(socket.SHUT_RDWR)

  def receive(self, *keys: str) -> list[Any]:
    """Returns these values of the next message that is no sign of life.

    Raises:
      TimeoutError: there was no sign of life for the time-out.
      OSError, EOFError: the peer is gone.
      ValueError, KeyError, TypeError: it is not a process of this run.
    """
    while line := self.lines.readline():
      if message := json.loads(line):
        return [message[key] for key in keys]
    raise EOFError("it closed the connection")


class Processes:
  """The other processes as this one sees them: process 0 sees all, the others see process 0."""

  def __init__(self, index: int, count: int, timeout: float, patience: float):
    """Prepares the watch.

    Args:
      index: of this process.
      count: of all processes.
      timeout: seconds without a sign of life after which a process is lost.
      patience: seconds in which all processes have to start.
    """
    self._index, self._count, self._timeout, self._patience = index, count, timeout, patience
    self._name = f"process {index} ({socket.gethostname()}, pid {os.getpid()})"
    self._peers: list[_Peer] = []
    self._end = threading.Lock()
    threading.Thread(target=self._beat, daemon=True).start()

  def meet(self, address: str, port: int) -> None:
    """Returns when all processes have said who they are.

    Args:
      address: HOST:PORT of process 0. When all are there, nobody listens at it any more.
      port: at which process 0 listens.

    Raises:
      UserError: some did not come in time, or they disagree on who they are.
    """
    deadline = time.monotonic() + self._patience
    if self._index:
      self._find_first(address, deadline)
    else:
      self._gather(port, deadline)

  def _gather(self, port: int, deadline: float) -> None:
    names = {0: self._name}
    with _listen(port) as server:
      while len(names) < self._count:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
          connection, _ = server.accept()
        except TimeoutError:
          missing = [str(number) for number in range(self._count) if number not in names]
          raise PeerError(
            f"{len(missing)} of {self._count} processes did not start within "
            f"{self._patience:g} s: number {', '.join(missing)}; look at their output, and "
            "start the same command on all hosts"
          ) from None
        peer = _Peer(connection, self._timeout)
        try:
          index, count, peer.name, arguments = peer.receive("index", "count", "name", "arguments")
        except _NO_MESSAGE:  # somebody else's connection
          peer.close()
          continue
        self._peers.append(peer)
        threading.Thread(target=self._watch, args=(peer,), daemon=True).start()
        if count != self._count or index in names:
          number = index if index in names else 0
          raise UserError(
            f"{peer.name} has number {index} of JAX_NUM_PROCESSES={count}, and {names[number]} has "
            f"number {number} of {self._count}; give every process a JAX_PROCESS_ID of its own and "
            "the same JAX_NUM_PROCESSES"
          )
        if different := set(arguments) ^ set(_arguments()):
          raise UserError(
            f"{peer.name} was started with other arguments than process 0: "
            f"{' '.join(sorted(different))}; start the same command on all hosts"
          )
        names[index] = peer.name
    for peer in self._peers:
      peer.send(name=self._name, end="", code=0)

  def _find_first(self, address: str, deadline: float) -> None:
    host, _, port = address.rpartition(":")
    while True:
      try:
        peer = _Peer(socket.create_connection((host.strip("[]"), int(port)), 5), self._timeout)
        self._peers = [peer]
        peer.send(index=self._index, count=self._count, name=self._name, arguments=_arguments())
        peer.name, line, code = peer.receive("name", "end", "code")
        break
      except _NO_MESSAGE as error:  # not there yet, or an earlier start's
        self._peers = []
        if time.monotonic() > deadline:
          raise PeerError(
            f"{self._name} did not find process 0 at JAX_COORDINATOR_ADDRESS={address} within "
            f"{self._patience:g} s ({error}); start it there, or correct the address"
          ) from None
        time.sleep(0.2)
    if line:
      peer.heard_all.set()
      self.end(line, code)
    threading.Thread(target=self._watch, args=(peer,), daemon=True).start()

  def _beat(self) -> None:
    while True:
      time.sleep(self._timeout / 10)
      for peer in self._peers:
        peer.send()

  def _watch(self, peer: _Peer) -> None:
    """Waits for a peer's last word; ends this process if the peer is lost or has failed."""
    try:
      line, code = peer.receive("end", "code")
    except TimeoutError:
      line, code = f"has given no sign of life for --peer_timeout={self._timeout:g} s", None
    except _NO_MESSAGE:
      line, code = "is gone", None
    peer.heard_all.set()
    if code is None:
      self.end(f"{peer.name} {line}; {_AGAIN}", PeerError.code)
    if line:
      time.sleep(_MOMENT)
      self.end(line, code)

  def leave(self) -> None:
    """Tells the others that this process ends as it should."""
    for peer in self._peers:
      peer.send(name=self._name, end="", code=0)

  def fail(self, error: BaseException) -> NoReturn:
    """Prints an error of this process, and ends it and all others."""
    code, what = _INTERRUPTED, "was interrupted"
    if isinstance(error, UserError):
      code, what = error.code, f"ended with an error: {error}"
    elif isinstance(error, Exception):
      code, what = PeerError.code, f"ended with an error: {type(error).__name__}: {error}"
      time.sleep(_MOMENT)  # if a peer is lost, _watch says it better and ends this process
    self.end(f"{self._name} {' '.join(what.split())[:500]}", code, error)

  def end(self, line: str, code: int, error: BaseException | None = None) -> NoReturn:
    """Ends this process and all others.

    Args:
      line: what every process prints, except one that has an error of its own to print.
      code: the exit code of those that print the line.
      error: of this process.
    """
    self._end.acquire()  # for ever: the first thread that comes here ends the process
    for peer in self._peers:
      peer.send(name=self._name, end=line, code=code)
    if error is None:
      os.write(2, f"error: {shown(line)}\n".encode())
    else:
      code = _print_error(error)
    deadline = time.monotonic() + _FAREWELL
    for peer in self._peers:
      peer.heard_all.wait(max(deadline - time.monotonic(), 0))
    os._exit(code)  # a usual end waits for the processes that are lost


def _arguments() -> list[str]:
  """Returns those of the command line, which all processes must share but for a local folder."""
  return [word for word in sys.argv[1:] if not word.startswith("--cache_dir")]


def _listen(port: int) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
    )
  except OSError as error:
    raise UserError(
      f"process 0 cannot listen at port {port} ({os.strerror(error.errno or 0)}): end the process "
      "that has it, perhaps of an earlier start, or choose another in JAX_COORDINATOR_ADDRESS"
    ) from None


def _print_error(error: BaseException) -> int:
  """Prints an error as a process does that is alone; returns the exit code."""

  def again() -> None:
    raise error

  try:
    command_line.one_line_errors(again, sys.exit)
  except SystemExit as end:
    return int(end.code or 0)
  except BaseException:
    traceback.print_exc()
  return 1
