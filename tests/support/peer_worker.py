"""One of several processes, without jax: peer_worker.py INDEX COUNT PORT TIMEOUT PATIENCE BODY.

When all have met it says so; then it waits, computes, leaves, or fails, as BODY says.
"""

import sys
import time

from moe_jax.errors import UserError
from moe_jax.start import peers


def compute(seconds):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    pass


def main(index, count, port, timeout, patience, body):
  processes = peers.Processes(index, count, timeout, patience)
  try:
    processes.meet(f"localhost:{port}", port)
    print("met", flush=True)
    if body == "user_error":
      raise UserError("config.data.path=here: no such file")
    if body == "bug":
      raise ZeroDivisionError("a bug")
    if body == "interrupt":
      raise KeyboardInterrupt
    if body == "compute":
      compute(4)
    if body == "nap":
      time.sleep(3)
    if body == "wait":
      time.sleep(600)
    processes.leave()
  except BaseException as error:
    processes.fail(error)


if __name__ == "__main__":
  index, count, port, timeout, patience, body = sys.argv[1:7]
  del sys.argv[1:7]  # what is left is the command that all processes share
  main(int(index), int(count), int(port), float(timeout), float(patience), body)
