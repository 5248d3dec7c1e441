"""Whatever validate() accepts can be trained and evaluated; whatever it refuses, it names."""

import os

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import Attention, Config
from moe_jax.config.fields import Choice, flatten, walk
from moe_jax.kernels import choose
from moe_jax.model import cost
from moe_jax.moe import validation
from moe_jax.training import evaluator, optimizers
from moe_jax.training import setup as setup_lib
from moe_jax.training.step import compile_step
from tests.support.random_configs import draw
from tests.support.toy_text import toy_rows


def check(config: Config) -> Config:
  """What train.py checks before a run: the fields, the mesh, the platform."""
  validation.validate(config)
  mesh = config.mesh
  devices = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
  config = validation.resolve_mesh(config, devices if 0 < devices < 8 else 8)
  choose.check_kernels(config)
  return config


def check_memory(config: Config) -> Config:
  """And the memory, which takes a second."""
  config = check(config)
  if max(value for value in flatten(config).values() if type(value) is int) > 1000:
    cost.check_training_memory(config, optimizers.abstract_state(config))
  return config


def numbers_of_a_run(config: Config) -> dict[str, np.ndarray]:
  """Returns the metrics of two training steps and of an evaluation."""
  mesh = sharding.make_mesh(config.mesh)
  rows = toy_rows([5, 40, 1, 30, 60], [0, 1, 0, 1, 1], seq_len=config.data.seq_len)
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    step, state, numbers = compile_step(setup), setup.init(), {}
    for _ in range(2):
      batch = rows.batch(np.arange(config.data.batch_size) % len(rows))
      state, values = step(state, sharding.to_global(batch, mesh))
      numbers |= {name: np.asarray(value) for name, value in values.items()}
    result = evaluator.Evaluator(config, rows, mesh, 1)(state.params, state.bias_ZE)
  return numbers | {f"evaluation {name}": np.asarray(v) for name, v in result.items()}


# RANDOM_CONFIGS=200 trains so many; each is compiled for some seconds.
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("RANDOM_CONFIGS", "6"))))
def test_an_accepted_config_trains(seed):
  config, errors = draw(np.random.default_rng(seed), check_memory)
  assert not any("\n" in error for error in errors)
  for name, value in numbers_of_a_run(config).items():
    assert np.isfinite(value).all(), f"{name} is {value} of {config}"


@pytest.mark.slow
def test_every_word_is_drawn_and_what_is_refused_is_one_line():
  """Of what this platform has; a draw is refused some times before it is a config."""
  words, lines = set(), []
  for seed in range(64):
    config, errors = draw(np.random.default_rng(seed), check)
    words |= {value for _, _, value in walk(config) if isinstance(value, Choice)}
    lines += errors
  elsewhere = {Attention.CUDNN, Attention.SPLASH}
  assert {word for kind in Choice.__subclasses__() for word in kind} - words <= elsewhere
  assert len(lines) > 100 and not any("\n" in line for line in lines)
