"""The letters of names are true in training, evaluation and decoding; a planted lie is found."""

import functools
import importlib.util
import textwrap

import jax
import jax.numpy as jnp
import pytest

from moe_jax import sharding
from moe_jax.config import Dispatch, Exchange, GroupedMatmul, Mesh, QKNorm, override
from moe_jax.inference import decoding
from moe_jax.storage import checkpoint
from moe_jax.training import setup as setup_lib
from moe_jax.training.step import compile_step
from tests.support import routings, shape_names
from tests.support.toys import (
  slow_unless,
  toy_batch,
  toy_config,
  with_delta,
  with_latents,
  with_options,
)


def grouped(exchange=Exchange.AUTO, kernel=GroupedMatmul.BLOCKED):
  return dict(dispatch=Dispatch.GROUPED, exchange=exchange, grouped_matmul=kernel)


PATHS = {
  "gather": ({}, {}),
  "gather, expert 2, data 2": ({}, dict(expert=2, data=2)),
  "einsum": (dict(dispatch=Dispatch.EINSUM), {}),
  "dense": (dict(dispatch=Dispatch.DENSE), {}),
  "blocked": (grouped(), {}),
  "ragged dot": (grouped(kernel=GroupedMatmul.RAGGED_DOT), {}),
  "all_gather": (grouped(Exchange.ALL_GATHER), dict(expert=2, tensor=2)),
  "all_to_all": (grouped(Exchange.ALL_TO_ALL), dict(expert=4, data=2)),
  "ragged": (grouped(Exchange.RAGGED), dict(expert=2, fsdp=2)),
}
# Of each router one routing: the others differ in numbers.
ROUTERS = {
  f"router {name}": (fields, {})
  for name, (fields, *_) in routings.ROUTINGS.items()
  if name in ("expert-choice", "noisy", "hash", "random", "sinkhorn", "priority-score", "deepseek")
}


# All functions but one exchange and the routers that the slow ones name.
EVERYDAY = ["gather, expert 2, data 2", "all_to_all"]


@pytest.mark.parametrize("name", slow_unless(EVERYDAY, PATHS | ROUTERS))
def test_a_training_step(name):
  fields, axes = (PATHS | ROUTERS)[name]
  config = toy_config(shared_experts=1, **dict(num_experts=8) | fields)
  config = override(
    config,
    {
      "model.qk_norm": QKNorm.HEAD,
      "model.num_layers": 1,
      "train.accumulation": 2,
      "data.batch_size": 16,
      "loss.load_balance": 0.0,  # which some routers do not take
      "mesh": Mesh(**{"data": 1} | axes),
    },
  )
  lies = lies_of_a_step(config)
  assert not lies, "\n".join(sorted(lies))


def lies_of_a_step(config):
  """Functions run while a step is traced; none is left for when it is lowered."""
  with shape_names.checked() as lies:
    mesh, state, step = abstract(config)
    with jax.set_mesh(mesh):
      step.trace(state, sharding.to_global(toy_batch(config), mesh))
  return lies


def abstract(config):
  """Returns a mesh, the shapes of a state, and the step, of which nothing is compiled."""
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    state = checkpoint.abstract(setup.shapes, setup.shardings)
    return mesh, state, compile_step(setup)


@pytest.mark.parametrize("axes", [{}, dict(expert=2, tensor=2)], ids=str)
def test_evaluation_prefill_and_decoding(axes):
  lies = lies_of_generation(toy_config(shared_experts=1), axes)
  assert not lies, "\n".join(sorted(lies))


@pytest.mark.slow
@pytest.mark.parametrize("options", [with_options, with_latents, with_delta])
def test_every_option_of_the_layers(options):
  config = toy_config()
  config = override(config, {"model": options(config.model)})
  lies = lies_of_a_step(config) | lies_of_generation(config, {})
  assert not lies, "\n".join(sorted(lies))


def lies_of_generation(config, axes):
  config = override(config, {"mesh": Mesh(**{"data": 1} | axes)})
  mesh, state, _ = abstract(config)
  model = decoding.for_inference(config.model)

  def generate(weights, start_B, tokens_BL):
    cache = decoding.empty_cache(model, start_B, 16)
    cache = decoding.forward_with_cache(weights, model, cache, tokens_BL, all_logits=True).cache
    out = decoding.forward_with_cache(
      weights, model, cache, tokens_BL[:, :1], all_logits=False, trace=True
    )
    return out.logits_BLV, out.choices

  start_B, tokens_BL = jnp.array([0, 3, 1, 9]), jnp.zeros((4, 8), jnp.int32)
  # On a mesh `weights` also places them, which shapes alone do not allow.
  lay_out = decoding.unstacked if axes else decoding.weights
  with jax.set_mesh(mesh), shape_names.checked() as lies:
    weights = jax.eval_shape(functools.partial(lay_out, model), state.params, state.bias_ZE)
    jax.eval_shape(generate, weights, start_B, tokens_BL)
  return lies


def test_a_planted_lie_is_found(tmp_path, monkeypatch):
  """A wrong rank and a letter of two sizes; arrays that are true, and other values, are passed."""
  (tmp_path / "lying.py").write_text(
    textwrap.dedent("""
    import numpy as np

    def rank():
      x_BLD = np.zeros((2, 3))
      return x_BLD

    def size():
      x_BD, y_DF = np.zeros((2, 3)), np.zeros((4, 5))
      return x_BD, y_DF

    def true():
      x_BD, total_B1, E, gate_EDF = np.zeros((2, 3)), np.zeros((2, 1)), 3, (np.zeros(1),)
      return x_BD, total_B1, E, gate_EDF
    """)
  )
  monkeypatch.setattr(shape_names, "PACKAGE", str(tmp_path))
  spec = importlib.util.spec_from_file_location("lying", tmp_path / "lying.py")
  lying = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(lying)
  for function, says in (
    (lying.rank, "x_BLD has the shape (2, 3)"),
    (lying.size, "D is 3 in x_BD"),
  ):
    with shape_names.checked() as lies:
      function()
    (lie,) = lies
    assert says in lie and function.__name__ in lie
  with shape_names.checked() as lies:
    lying.true()
  assert not lies
