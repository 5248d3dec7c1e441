"""What a config must satisfy: each mistake is one line with the field, the value and the remedy."""

import copy
import math
import operator
import subprocess
import sys

import pytest

from moe_jax.config import (
  Delta,
  Dispatch,
  Exchange,
  ExchangeFallback,
  Latent,
  Loss,
  Mesh,
  Priority,
  Router,
  Schedule,
  Score,
  override,
)
from moe_jax.errors import UserError
from moe_jax.moe import validation
from tests.support.toys import ROOT, toy_config

DISAGREEMENTS = {
  "model.num_kv_heads=3": "config.model.num_heads=4",
  "model.head_dim=5": "even",
  "model.moe.top_k=5": "config.model.moe.num_experts=4",
  "model.moe.router=switch": "top_k=1",
  "model.moe.capacity_factor=0": "must be above 0; inf is no limit",
  "model.moe.eval_capacity_factor=nan": "finite",
  "model.moe.gate_scale=inf": "finite",
  "model.moe.every=3": "config.model.num_layers=2",
  "model.moe.first_dense=2": "num_experts=0",
  "model.moe.dense_layers=01": "the indices of layers",
  "model.moe.group_size=4": "config.data.seq_len=9",
  "model.moe.jitter=1.5": "below 1",
  "model.global_every=2": "config.model.window=0: all layers attend to everything",
  "model.latent.kv_dim=4": "config.model.latent.kv_dim=4: each head has keys and values",
  "mesh.expert=3": "config.model.moe.num_experts=4",
  "mesh.tensor=4": "config.model.num_kv_heads=2",
  "mesh.fsdp=4": "config.model.dim=10",
  "mesh.data=3": "config.data.batch_size=8",
  "mesh.data=0": "-1 for all devices that are left",
  "mesh.data=-2": "at least -1",
  "train.accumulation=3": "config.data.batch_size=8",
  "train.steps=0": "at least 1",
  "optimizer.learning_rate=-1.0": "above 0",
  "optimizer.warmup_steps=11": "config.train.steps=10",
  "optimizer.b2=1.0": "below 1",
  "optimizer.final_fraction=1.5": "at most 1",
  "loss.load_balance=nan": "finite",
  "loss.z=1e39": "float32's range",
  "optimizer.eps=1e-46": "float32's range",
  "data.path=x": "config.data.name=python_stdlib: only name=text reads a path",
  "data.batch_size=134217728": "config.data.seq_len=9: a batch has more than 2147483647 tokens",
  "eval.batch_size=134217728": "config.data.seq_len=9: a batch has more than 2147483647 tokens",
  "train.steps=2147483648": "an integer is at most 2147483647",
  "train.seed=4294967296": "at least 0 and at most 4294967295",
}


@pytest.mark.parametrize("change", DISAGREEMENTS)
def test_disagreeing_fields_are_named(change):
  config = toy_config()
  validation.validate(config)
  name, text = change.split("=")
  config = override(config, {name: type(operator.attrgetter(name)(config))(text)})
  with pytest.raises(UserError) as error:
    validation.validate(config)
  message = str(error.value)
  assert f"config.{name}=" in message and DISAGREEMENTS[change] in message and "\n" not in message


def test_a_warm_up_that_reaches_into_the_fall_of_wsd_is_refused():
  config = toy_config({"optimizer.schedule": Schedule.WSD, "optimizer.warmup_steps": 8})
  validation.validate(config)
  config = override(config, {"optimizer.warmup_steps": 9})  # of 10, and it falls in the last two
  with pytest.raises(UserError, match=r"warmup_steps=9 with config.optimizer.decay_fraction=0.2"):
    validation.validate(config)


def test_an_evaluation_batch_splits_over_all_axes_of_the_batch():
  config = toy_config({"mesh": Mesh(data=2, expert=2), "eval.batch_size": 6})
  with pytest.raises(UserError, match=r"eval\.batch_size=6 does not divide over"):
    validation.validate(config)


LATENT, DELTA = dict(kv_dim=4, rotary_dim=2, value_dim=6), dict(value_heads=6, key_heads=3)


@pytest.mark.parametrize(
  ("latent", "delta", "model", "text"),
  [
    (dict(rotary_dim=3), {}, {}, "config.model.latent.rotary_dim=3 must be even"),
    (
      dict(rotary_dim=6),
      {},
      {},
      "config.model.head_dim=6 must be above config.model.latent.rotary_dim",
    ),
    (dict(value_dim=7), {}, {}, "and at least value_dim=7"),
    ({}, {}, dict(qkv_bias=True), "config.model.qkv_bias=True with config.model.latent.kv_dim=4"),
    ({}, {}, dict(rotary_fraction=0.5), "latent attention has none; set it to 1.0"),
    (None, dict(key_heads=4), {}, "config.model.delta.value_heads=6 is not divisible by"),
    (None, {}, dict(window=3), "a layer has a window or the delta rule; set window=0"),
  ],
)
def test_latents_and_delta_rules_that_make_no_sense_are_refused(latent, delta, model, text):
  def validate(latent, delta, model):
    config = toy_config()
    if latent is None:
      config = override(config, {"model.delta": Delta(**DELTA | delta)})
    else:
      config = override(
        config,
        {"model.num_kv_heads": config.model.num_heads, "model.latent": Latent(**LATENT | latent)},
      )
    validation.validate(override(config, {f"model.{name}": v for name, v in model.items()}))

  validate(None if latent is None else {}, {}, {})
  with pytest.raises(UserError) as error:
    validate(latent, delta, model)
  assert text in str(error.value) and "\n" not in str(error.value)


HASH = dict(router=Router.HASH, top_k=1)
# fields of moe, fields of loss: (the two fields that disagree, why or what to do)
WRONG_ROUTINGS = [
  (HASH | dict(top_k=2), {}, "router", "top_k", "hashes to one expert"),
  (HASH, dict(load_balance=0.01), "router", "loss.load_balance", "set load_balance=0"),
  (dict(router=Router.NOISY_TOPK, top_k=4), {}, "router", "top_k", "lower top_k"),
  (dict(router=Router.EXPERT_CHOICE), {}, "router", "renormalize", "set renormalize=false"),
  (
    dict(router=Router.EXPERT_CHOICE, renormalize=False, eval_capacity_factor=math.inf), {},
    "router", "eval_capacity_factor", "a finite number",
  ),
  (
    dict(router=Router.EXPERT_CHOICE, renormalize=False, priority=Priority.SCORE), {},
    "router", "priority", "priority=token",
  ),
  (dict(router=Router.SINKHORN, score=Score.SIGMOID), {}, "router", "score", "router=topk"),
  (dict(router=Router.SINKHORN, bias_update_rate=0.1), {}, "router", "bias_update_rate", "topk"),
  (dict(router=Router.SINKHORN, expert_groups=2), {}, "router", "expert_groups", "groups=1"),
  (dict(router=Router.SINKHORN, top_groups=2), {}, "top_groups", "expert_groups", "once"),
  (dict(expert_groups=4, top_groups=2), {}, "num_experts", "expert_groups", "two experts"),
  (dict(expert_groups=2, top_groups=3), {}, "top_groups", "expert_groups", "once"),
  (dict(expert_groups=2, top_k=3), {}, "top_k", "top_groups", "raise top_groups"),
  ({}, dict(load=0.1), "router", "loss.load", "set loss.load=0"),
  (dict(exchange=Exchange.RAGGED), {}, "exchange", "dispatch", "set exchange=auto"),
  (
    dict(dispatch=Dispatch.GROUPED, exchange_factor=1.5), {}, "exchange_factor", "exchange",
    "set exchange_factor=0",
  ),
  (
    dict(dispatch=Dispatch.GROUPED, exchange_fallback=ExchangeFallback.EXACT), {},
    "exchange_fallback", "exchange_factor", "set exchange_fallback=none",
  ),
]  # fmt: skip


@pytest.mark.parametrize(("moe", "loss", "first", "second", "text"), WRONG_ROUTINGS)
def test_routings_that_make_no_sense_are_refused(moe, loss, first, second, text):
  config = toy_config({"loss": Loss(**{"load_balance": 0.0} | loss)}, **moe)
  with pytest.raises(UserError) as error:
    validation.validate(config)
  second = second if second.startswith("loss.") else f"model.moe.{second}"
  assert str(error.value).startswith(f"config.model.moe.{first}=")
  assert f"with config.{second}=" in str(error.value) and text in str(error.value)


@pytest.mark.parametrize(
  ("moe", "fields", "second", "text"),
  [
    (dict(dispatch=Dispatch.GROUPED), {}, "data.batch_size=8", "device's 72 tokens"),
    (dict(), {}, "data.batch_size=8", "device's 8 routing groups"),  # which fill slots
    (dict(dispatch=Dispatch.GROUPED), {"data.batch_size": 5, "eval.batch_size": 8},
     "eval.batch_size=8", "device's 72 tokens"),
  ],
)  # fmt: skip
def test_chunks_are_equal(moe, fields, second, text):
  config = toy_config(fields, exchange_chunks=5, **moe)
  with pytest.raises(UserError) as error:
    validation.validate(config)
  assert str(error.value).startswith(f"config.model.moe.exchange_chunks=5 with config.{second}")
  assert text in str(error.value)


CAPACITIES = {"model.moe.capacity_factor", "model.moe.eval_capacity_factor"}


@pytest.mark.parametrize(
  ("moe", "ignored"),
  [
    (dict(), set()),
    (dict(capacity_factor=math.inf), set()),
    (dict(dispatch=Dispatch.GROUPED), CAPACITIES),
    (dict(dispatch=Dispatch.DENSE), CAPACITIES),
    (dict(dispatch=Dispatch.GROUPED, router=Router.EXPERT_CHOICE, renormalize=False), set()),
    (dict(top_k=1), {"model.moe.renormalize"}),
    (dict(top_k=1, router=Router.SWITCH), {"model.moe.renormalize"}),
    (dict(top_k=1, router=Router.EXPERT_CHOICE), {"model.moe.renormalize"}),
  ],
)
def test_one_field_is_enough(moe, ignored):
  """Dropless is the dispatch and top-1 is top_k: what others say then is not refused."""
  config = toy_config({"loss": Loss(load_balance=0.0)}, **moe)
  validation.validate(config)
  assert validation.ignored_fields(config) == ignored


def test_what_cannot_drop_cannot_leak():
  for dispatch, leaks in ((Dispatch.GATHER, True), (Dispatch.GROUPED, False)):
    moe = toy_config(dispatch=dispatch, priority=Priority.SCORE).model.moe
    assert bool(validation.future_leak(moe, train=True)) is leaks


def test_to_validate_changes_nothing():
  config = toy_config()
  object.__setattr__(config.loss, "z", 1)  # as nothing else can
  before = copy.deepcopy(config)
  with pytest.raises(UserError, match=r"config.loss.z=1 is of type int, not float"):
    validation.validate(config)
  assert config == before and type(config.loss.z) is int


def test_wrong_type_in_a_file():
  config = toy_config({"model.moe.num_experts": "8"})
  with pytest.raises(UserError, match=r"config.model.moe.num_experts='8'.*str, not int"):
    validation.validate(config)


def test_mesh_must_match_the_devices():
  config = toy_config({"mesh": Mesh(expert=2)})
  assert validation.resolve_mesh(config, 8).mesh.data == 4
  config = override(config, {"mesh": Mesh(data=2, expert=2)})
  with pytest.raises(UserError, match=r"8 device.*XLA_FLAGS"):
    validation.resolve_mesh(config, 8)


def test_a_mistake_is_told_before_a_device_is_touched():
  code = (
    "import sys; from moe_jax.config import Config; from moe_jax.moe import validation; "
    "validation.validate(Config()); "
    "from jax._src import xla_bridge; sys.exit(xla_bridge.backends_are_initialized())"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_largest_numbers_are_allowed():
  seed, steps = 2**32 - 1, 2**31 - 1
  fields = {"train.seed": seed, "data.seed": seed}
  fields |= dict.fromkeys(("train.steps", "train.eval_every", "health.window"), steps)
  fields["model.moe.capacity_factor"] = 3e38  # as good as inf: no group has so many tokens
  validation.validate(toy_config(fields))


def test_slots_that_int32_cannot_number_are_refused():
  """With all devices that are left (data=-1) it is not known yet how many slots one has."""
  config = toy_config(
    {"data.batch_size": 512, "mesh.data": -1},
    num_experts=2**20,
    capacity_factor=math.inf,
    dispatch=Dispatch.EINSUM,
  )
  validation.validate(config)
  with pytest.raises(UserError, match=r"num_experts=1048576 with .*batch_size=512: a dev"):
    validation.resolve_mesh(config, 2)
  validation.resolve_mesh(config, 512)
  # has rows for what is routed alone
  config = override(config, {"model.moe.dispatch": Dispatch.GROUPED})
  validation.resolve_mesh(config, 1)
