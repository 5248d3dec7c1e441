"""Toy configs, meshes of simulated devices, states and batches for many tests."""

import dataclasses
import enum
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import (
  Activation,
  Config,
  Data,
  Delta,
  Latent,
  Mesh,
  Model,
  MoE,
  Optimizer,
  QKNorm,
  RopeKind,
  RopeScaling,
  Train,
  override,
)
from moe_jax.data import pipeline
from moe_jax.model import transformer
from moe_jax.model.pattern import moe_layers
from moe_jax.moe import validation
from moe_jax.moe.routing import Tokens
from moe_jax.storage import checkpoint
from moe_jax.training import losses
from moe_jax.training import setup as setup_lib
from moe_jax.training import step as step_lib
from moe_jax.training.step import compile_step

ROOT = pathlib.Path(__file__).parents[2]


def mesh_of(**axes: int) -> jax.sharding.Mesh:
  """Returns a mesh of the first devices: mesh_of(expert=4, data=2)."""
  return sharding.make_mesh(Mesh(**{"data": 1} | axes))


def toy_config(fields=None, **moe) -> Config:
  """Returns a config of some thousand parameters; mesh axes can be 2, data and expert also 4.

  Args:
    fields: other values of the config, {"mesh.expert": 2}.
    **moe: fields of config.model.moe.
  """
  moe = {"num_experts": 4, "top_k": 2, "expert_dim": 18} | moe
  config = Config(
    model=Model(
      vocab_size=24,
      num_layers=2,
      dim=10,
      num_heads=4,
      num_kv_heads=2,
      head_dim=6,
      ffn_dim=14,
      moe=MoE(**moe),
    ),
    data=Data(seq_len=9, batch_size=8),
    optimizer=Optimizer(warmup_steps=1, learning_rate=0.01),
    train=Train(steps=10, eval_every=5, checkpoint_every=5),
    mesh=Mesh(data=1),
  )
  return override(config, fields or {})


def slow_unless(everyday, names):
  """Returns the names as parameters of a test; names that are not in `everyday` are slow."""
  return [
    pytest.param(name, marks=[] if name in everyday else [pytest.mark.slow]) for name in names
  ]


def example(mentions: str) -> str:
  """Returns the code block of docs/extending.md that mentions something."""
  page = (ROOT / "docs/extending.md").read_text()
  (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if mentions in c)
  return code


def new_name(monkeypatch: pytest.MonkeyPatch, kind: type[enum.Enum], value: str) -> enum.Enum:
  """Adds a member to an enum of the config while a test runs, and returns it."""
  member = object.__new__(kind)
  member._name_, member._value_ = value.upper(), value
  monkeypatch.setattr(kind, value.upper(), member, raising=False)
  return member


def toy_batch(config, seed=0):
  """Returns rows of two documents and padding, whose lengths differ from row to row."""
  rng = np.random.default_rng(seed)
  B, L = config.data.batch_size, config.data.seq_len
  tokens = rng.integers(0, config.model.vocab_size, (B, L + 1)).astype(np.int32)
  cut, end = rng.integers(1, L - 1, (B, 1)), rng.integers(L - 3, L + 1, (B, 1))
  column = np.arange(L)[None]
  segments = np.where(column < cut, 1, 2) * (column < end)
  positions = np.where(column < cut, column, column - cut)
  fields = (tokens[:, :-1], tokens[:, 1:], segments, positions)
  return pipeline.Batch(*(np.asarray(f, np.int32) for f in fields))


def tokens_of(ids_BL):
  """Returns rows of one document each."""
  ids_BL = jnp.asarray(ids_BL, jnp.int32)
  places_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1]), ids_BL.shape).astype(jnp.int32)
  return Tokens(ids_BL=ids_BL, segments_BL=jnp.ones_like(ids_BL), positions_BL=places_BL)


def set_up(config, axes):
  """Returns a mesh, a state whose routers are as uneven as learned ones, and the jitted step."""
  config = override(config, {"mesh": Mesh(**{"data": 1} | axes)})
  validation.validate(config)
  mesh = mesh_of(**axes)
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    state = setup.init()

    def scale(path, leaf):
      return leaf * 30 if "router_DE" in jax.tree_util.keystr(path) else leaf

    params = jax.tree_util.tree_map_with_path(scale, state.params)
    params = jax.device_put(params, setup.shardings.params)
    return mesh, state._replace(params=params), compile_step(setup)


def lower_step(config):
  """Traces a training step of a config on its mesh, without a state."""
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    step, state = compile_step(setup), checkpoint.abstract(setup.shapes, setup.shardings)
    return step.lower(state, sharding.to_global(toy_batch(config), mesh))


def gradients(state, batch, config):
  def loss(params):
    key = jax.random.key(0)
    sums = step_lib.batch_sums(params, state.bias_ZE, batch, key, config=config)
    return losses.total(sums, config.loss, len(moe_layers(config.model))).total

  return jax.grad(loss)(state.params)


def build(config, seed=0):
  """Returns graph and params with routers scaled up, so that routing is as uneven as learned.

  Biases, which begin at zero, are drawn.
  """
  graph, params = nnx.split(transformer.Transformer(config.model, nnx.Rngs(seed)))

  def changed(name, v):
    if name == "router_DE":
      return v.replace(v[...] * 30)
    if "bias_" in name or name == "sinks_H":
      return v.replace(0.3 * jax.random.normal(jax.random.key(seed), v.shape))
    return v

  flat = [(path, changed(path[-1], v)) for path, v in nnx.to_flat_state(params)]
  return graph, nnx.from_flat_state(flat)


def with_options(model):
  """Returns a toy model with every option of its layers that is off by default."""
  return dataclasses.replace(
    model,
    qk_norm=QKNorm.WIDTH,
    qkv_bias=True,
    out_bias=True,
    rotary_fraction=0.67,
    rope_scaling=RopeScaling(kind=RopeKind.YARN, factor=3.0, original_length=8, beta_fast=4.0),
    window=4,
    global_every=2,
    sinks=True,
    soft_cap=1.5,
    logit_soft_cap=2.0,
    activation=Activation.CLAMPED_SWIGLU,
    activation_limit=0.9,
    attention_scale=0.7,
    embedding_multiplier=2.0,
    residual_multiplier=0.5,
    logit_multiplier=1.5,
    moe=dataclasses.replace(
      model.moe,
      shared_experts=1,
      shared_dim=14,
      shared_gate=True,
      expert_bias=True,
      router_bias=True,
    ),
  )


def with_latents(model, query_dim=5):
  """Returns a toy model with latent attention, windows, and groups that are chosen by the best."""
  return dataclasses.replace(
    model,
    latent=Latent(kv_dim=7, query_dim=query_dim, rotary_dim=4, value_dim=5),
    head_dim=9,
    num_kv_heads=model.num_heads,
    rope_interleaved=True,
    window=6,
    global_every=2,
    rope_scaling=RopeScaling(
      kind=RopeKind.YARN,
      factor=3.0,
      original_length=8,
      beta_fast=4.0,
      mscale_all_dim=0.8,
    ),
  )


def with_delta(model):
  """Returns a toy model in which every second layer has the delta rule in place of attention."""
  return dataclasses.replace(
    model,
    delta=Delta(value_heads=6, key_heads=2, key_dim=5, value_dim=3, conv_width=4),
    global_every=2,
    attention_gate=True,
    norm_offset=True,
    qk_norm=QKNorm.HEAD,
    rotary_fraction=0.67,
    moe=dataclasses.replace(model.moe, shared_experts=1, shared_gate=True),
  )


def biased_config(rate=0.05):
  return toy_config({"loss.load_balance": 0.0}, bias_update_rate=rate, capacity_factor=math.inf)


TOY_SIZES = dict(
  vocab_size=32,
  dim=16,
  layers=1,
  heads=2,
  kv_heads=1,
  experts_count=2,
  top_k=1,
  expert_dim=16,
  seq_len=8,
  batch_size=2,
  seed=0,
)
