"""Takes one step of a run again, to see where its first number is that is not finite."""

import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.data import pipeline
from moe_jax.errors import UserError
from moe_jax.storage import checkpoint
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import init_from
from moe_jax.training.run import begin_state, check_same_run, choose_kernels, next_after, read_text
from moe_jax.training.setup import Setup
from moe_jax.training.step import compile_step


def replay(setup: Setup, workdir: str, step: int) -> None:
  """Takes the steps from the checkpoint before `step` and then that step, under jax_debug_nans.

  A step depends on the state and its rows alone, so it is the one that the run took. Nothing is
  written to the workdir. The first operation whose result is not finite is printed.

  Args:
    setup: of the run.
    workdir: of the run.
    step: the number of the step to take again.

  Raises:
    UserError: the workdir has no run, or the run has no such step.
  """
  config, path = setup.config, workdir_lib.open_written(workdir)
  check_same_run(path, setup)
  if not (path / workdir_lib.CONFIG).exists():
    raise UserError(f"--replay={step}: --workdir={workdir} has no run; name that of the step")
  if step > config.train.steps:
    raise UserError(f"--replay={step}: the run has {config.train.steps} steps")
  text = read_text(setup, path)
  with jax.set_mesh(setup.mesh):
    setup = choose_kernels(setup, path, write=False)
    config, batches = setup.config, text.batches(setup)
    next_batch = 0
    start = max([0, *(saved for saved in workdir_lib.saved_steps(path) if saved < step)])
    if start:
      reader = checkpoint.Checkpointer.reading(path)
      state, next_batch = reader.restore(start, checkpoint.abstract(setup.shapes, setup.shardings))
      reader.close()
    else:
      state = begin_state(setup, init_from.find_source("", False, path, config))
    pipeline.skip_to(batches, next_after(start, next_batch, workdir_lib.rewinds(path)))
    print(f"step {step} again, from step {start}", flush=True)
    take = compile_step(setup, donate=False)
    for _ in range(start + 1, step):
      state, _ = take(state, sharding.to_global(next(batches), setup.mesh))
    numbers = pipeline.batch_rows(text.train, config.data, pipeline.next_number(batches))
    batch = sharding.to_global(next(batches), setup.mesh)
    _, values = take(state, batch)
    broken = [n for n, value in jax.device_get(values).items() if not np.isfinite(value).all()]
    lines = [f"rows of the split   {', '.join(map(str, numbers))}"]
    lines.append(f"not finite          {', '.join(broken) or 'nothing: all metrics are finite'}")
    if broken:
      with jax.debug_nans(True):  # a step that is compiled already would not look
        found = _first(compile_step(setup, donate=False), state, batch)
      lines.append(f"first of it         {found}")
  if jax.process_index() == 0:
    print("\n".join(lines))


def _first(take: Callable[[Any, Any], Any], state: Any, batch: Any) -> str:
  """Returns what jax says of the first operation whose result is not a number."""
  try:
    jax.block_until_ready(take(state, batch))
  except FloatingPointError as error:
    trace = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in trace if "moe_jax" in frame.filename and frame.name != "_first"]
    where = f", at {ours[-1].filename}:{ours[-1].lineno} in {ours[-1].name}" if ours else ""
    return " ".join(str(error).split()) + where
  return "nothing that jax_debug_nans sees: the values are infinite"
