"""Compiles a train step for an H200 that need not be present; writes its optimized HLO.

test_gpu_compile.py runs this file in a separate process.
"""

import os
import pathlib
import sys

from moe_jax.compile.environment import ENVIRONMENT

os.environ |= ENVIRONMENT  # otherwise jax takes the memory of a GPU that is present
os.environ.pop("XLA_FLAGS", None)  # those of conftest simulate devices

from moe_jax.compile import targets
from tests.support.train_step_case import compile_step


def main() -> None:
  attention, out = sys.argv[1:]
  devices = targets.devices(targets.parse("h200-4"))
  pathlib.Path(out).write_text(compile_step(devices, attention))


if __name__ == "__main__":
  main()
