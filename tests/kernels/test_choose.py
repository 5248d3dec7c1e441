"""Kernels are chosen once, compared with the reference, recorded, and taken from the record."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import Attention, Dispatch, Exchange, GroupedMatmul, Model, MoE, override
from moe_jax.errors import UserError
from moe_jax.kernels import attention, choose, experts, platform
from tests.support.toys import mesh_of, toy_config


def dropless(**fields):
  """At a length at which attention goes in blocks."""
  return toy_config({"data.seq_len": 64}, dispatch=Dispatch.GROUPED, **fields)


def test_a_cpu_takes_its_own_kernels():
  with jax.set_mesh(mesh_of()):
    config, record, lines = choose.resolve(dropless(), {})
  assert config.model.attention is Attention.BLOCKS
  assert config.model.moe.grouped_matmul is GroupedMatmul.BLOCKED
  assert config.model.moe.exchange is Exchange.ALL_GATHER
  assert record == {
    "device": jax.devices()[0].device_kind,
    "attention": "blocks",
    "grouped_matmul": "blocked",
    "exchange": "all_gather",
  }
  for line, name in zip(lines, ("attention", "grouped matmul", "exchange"), strict=True):
    assert line.startswith(name)
  assert "differs from the reference by" in lines[0] and "differs" in lines[1]


def test_what_does_not_give_the_references_answer_is_not_taken(monkeypatch):
  """A gradient that is wrong, a kernel that raises: the reference instead, and a line says why."""

  @jax.custom_jvp
  def identity(x):
    return x

  identity.defjvp(lambda primals, tangents: (primals[0], 1.01 * tangents[0]))
  blocks, blocked = (
    attention.ATTENTION_KERNELS[Attention.BLOCKS],
    experts.EXPERT_KERNELS[GroupedMatmul.BLOCKED],
  )

  def wrong_gradient(*args):
    return identity(blocks.function(*args))

  def raises(*_):
    raise NotImplementedError("not on this device")

  monkeypatch.setitem(
    attention.ATTENTION_KERNELS, Attention.BLOCKS, blocks._replace(function=wrong_gradient)
  )
  monkeypatch.setitem(
    experts.EXPERT_KERNELS, GroupedMatmul.BLOCKED, dataclasses.replace(blocked, function=raises)
  )
  with jax.set_mesh(mesh_of()):
    config, record, lines = choose.resolve(dropless(), {})
  assert config.model.attention is Attention.REFERENCE
  assert config.model.moe.grouped_matmul is GroupedMatmul.RAGGED_DOT
  assert "blocks differs from it by 1.0e-02" in lines[0] and "not on this device" in lines[1]
  assert (record["attention"], record["grouped_matmul"]) == ("reference", "ragged_dot")


def test_the_fastest_of_several_is_taken(monkeypatch):
  monkeypatch.setitem(
    experts.EXPERT_KERNELS,
    GroupedMatmul.RAGGED_DOT,
    dataclasses.replace(experts.EXPERT_KERNELS[GroupedMatmul.RAGGED_DOT], tried_on=("cpu",)),
  )
  seconds = iter([3.0, 2.0])
  monkeypatch.setattr(choose, "_step_seconds", lambda *_: next(seconds))
  with jax.set_mesh(mesh_of()):
    config, _, lines = choose.resolve(dropless(), {})
  assert config.model.moe.grouped_matmul is GroupedMatmul.BLOCKED
  assert "ragged_dot 3000.00 ms, blocked 2000.00 ms" in lines[1]


def test_the_record_decides_on_the_same_device(monkeypatch):
  """Nothing is compiled or compared; on another device the choice is made anew."""
  record = {
    "device": jax.devices()[0].device_kind,
    "attention": "reference",
    "grouped_matmul": "ragged_dot",
    "exchange": "all_to_all",
  }
  with jax.set_mesh(mesh_of()), monkeypatch.context() as patch:
    patch.setattr(choose, "kernel_difference", None)
    config, again, _ = choose.resolve(dropless(), record)
    assert again == record
    assert config.model.attention is Attention.REFERENCE
    assert config.model.moe.grouped_matmul is GroupedMatmul.RAGGED_DOT
    assert config.model.moe.exchange is Exchange.ALL_TO_ALL
  with jax.set_mesh(mesh_of()):
    config, _, lines = choose.resolve(dropless(), record | {"device": "TPU v9"})
  assert config.model.attention is Attention.BLOCKS
  assert "the run began on TPU v9" in lines[0]


def test_a_kernel_that_a_resumed_run_names_replaces_the_recorded_one():
  """It is printed and recorded, and from then on `auto` is that one."""
  with jax.set_mesh(mesh_of()):
    _, record, _ = choose.resolve(dropless(), {})
    named = override(
      dropless(grouped_matmul=GroupedMatmul.RAGGED_DOT, exchange=Exchange.ALL_TO_ALL),
      {"model.attention": Attention.REFERENCE},
    )
    _, changed, lines = choose.resolve(named, record)
    assert [line.split(" ", 1)[1].strip() for line in lines] == [
      "reference, which the config names; until now the run used blocks",
      "matmul     ragged_dot, which the config names; until now the run used blocked",
      "all_to_all, which the config names; until now the run used all_gather",
    ]
    assert changed == record | {
      "attention": "reference",
      "grouped_matmul": "ragged_dot",
      "exchange": "all_to_all",
    }
    config, again, _ = choose.resolve(dropless(), changed)
    assert again == changed and config.model.moe.exchange is Exchange.ALL_TO_ALL


def test_a_kernel_that_the_run_did_not_need_is_chosen_when_it_does():
  """A run that dispatched into slots recorded no kernel of the grouped dispatch."""
  slots = toy_config({"data.seq_len": 64})
  with jax.set_mesh(mesh_of()):
    _, record, _ = choose.resolve(slots, {})
    assert record["grouped_matmul"] == record["exchange"] == "auto"
    config, record, _ = choose.resolve(dropless(), record)
  assert config.model.moe.grouped_matmul is GroupedMatmul.BLOCKED
  assert config.model.moe.exchange is Exchange.ALL_GATHER and record["exchange"] == "all_gather"


def test_a_kernel_that_is_named_is_taken_or_refused():
  config = override(
    dropless(grouped_matmul=GroupedMatmul.RAGGED_DOT), {"model.attention": Attention.REFERENCE}
  )
  with jax.set_mesh(mesh_of()):
    same, _, lines = choose.resolve(config, {})
    assert same == override(config, {"model.moe.exchange": Exchange.ALL_GATHER})
    assert all("which the config names" in line for line in lines[:2])


def test_what_cannot_run_here_is_refused_before_a_run_starts(monkeypatch):
  """One line names the field, the platform and the remedy, not an error of the compiler."""
  config = dropless()
  choose.check_kernels(config)
  config = override(config, {"model.attention": Attention.SPLASH})
  with pytest.raises(UserError, match=r"config.model.attention=splash: it runs on tpu, not on cpu"):
    choose.check_kernels(config)
  config = override(
    config, {"model.attention": Attention.AUTO, "model.moe.grouped_matmul": GroupedMatmul.TRITON}
  )
  with pytest.raises(UserError, match=r"grouped_matmul=triton: it runs on gpu, .*set it to auto"):
    choose.resolve(config, {})
  config = override(
    config, {"model.moe.grouped_matmul": GroupedMatmul.AUTO, "model.moe.exchange": Exchange.RAGGED}
  )
  choose.check_kernels(config)  # one device exchanges nothing
  config = override(config, {"mesh.expert": 2})
  with pytest.raises(
    UserError, match=r"config.model.moe.exchange=ragged: .*not run on cpu; .*auto"
  ):
    choose.check_kernels(config)
  monkeypatch.setattr(platform, "name", lambda: "tpu")
  choose.check_kernels(config)
  config = override(config, {"model.attention": Attention.SPLASH, "data.seq_len": 100})
  with pytest.raises(UserError, match=r"attention=splash: it refuses a sequence of 100 tokens"):
    choose.check_kernels(config)


@pytest.mark.parametrize(
  ("variable", "level", "setting"),
  [
    ("=true", "UNKNOWN", "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true"),
    ("", "O0", "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler"),
    ("=false", "O1", "JAX_OPTIMIZATION_LEVEL=O1"),
    (None, "O3", "JAX_OPTIMIZATION_LEVEL=O3"),
    ("=False", "UNKNOWN", ""),
    (None, "O0", ""),
  ],
)
def test_a_scheduler_that_breaks_the_ragged_exchange_is_refused(
  variable, level, setting, monkeypatch
):
  """On a GPU, over several devices. A run that recorded it and says auto takes another."""
  flag = "--xla_gpu_enable_latency_hiding_scheduler"
  named = "--xla_a=1" if variable is None else f"{flag}=0 --xla_a=1 {flag}{variable} --xla_b=2"
  monkeypatch.setenv("XLA_FLAGS", named)
  config_of_jax = {**jax.config.values, "jax_optimization_level": level}
  monkeypatch.setattr(type(jax.config), "values", config_of_jax)
  ragged = override(dropless(exchange=Exchange.RAGGED), {"mesh.expert": 2})
  monkeypatch.setattr(platform, "name", lambda: "tpu")
  choose.check_kernels(ragged)
  monkeypatch.setattr(platform, "name", lambda: "gpu")
  choose.check_kernels(override(ragged, {"mesh.expert": 1}))
  choose.check_kernels(override(ragged, {"model.moe.exchange": Exchange.ALL_TO_ALL}))
  if setting:
    with pytest.raises(UserError) as error:
      choose.check_kernels(ragged)
    assert str(error.value) == (
      f"config.model.moe.exchange=ragged: with {setting}, which you can drop, its gradients are "
      "NaN on a GPU; set it to auto"
    )
  else:
    choose.check_kernels(ragged)
  auto = override(ragged, {"model.moe.exchange": Exchange.AUTO})
  record = {"attention": "reference", "grouped_matmul": "ragged_dot", "exchange": "ragged"}
  with jax.set_mesh(mesh_of(expert=2)):
    config, again, _ = choose.resolve(auto, record | {"device": jax.devices()[0].device_kind})
  assert again["exchange"] == config.model.moe.exchange.value
  assert again["exchange"] == ("all_gather" if setting else "ragged")


def test_groups_are_uneven():
  """None, one, and about a kernel's block; what tells most where there are few experts or rows."""
  assert choose.uneven_sizes(512, 8).tolist() == [257, 0, 1, 63, 65, 42, 42, 42]
  assert choose.uneven_sizes(512, 6).tolist() == [257, 0, 1, 63, 65, 126]
  assert choose.uneven_sizes(512, 5).tolist() == [257, 0, 1, 63, 191]
  assert choose.uneven_sizes(512, 2).tolist() == [257, 255]
  assert choose.uneven_sizes(512, 1).tolist() == [512]
  assert choose.uneven_sizes(100, 4).tolist() == [0, 1, 63, 36]
  for N, E in ((1, 8), (64, 3), (300, 64), (512, 128)):
    sizes = choose.uneven_sizes(N, E)
    assert sizes.sum() == N and len(sizes) == E and (sizes >= 0).all()


def test_another_platforms_kernels_become_auto(monkeypatch):
  """To evaluate on a laptop what was trained on a pod."""
  moe = MoE(grouped_matmul=GroupedMatmul.MOSAIC, exchange=Exchange.RAGGED)
  model = Model(attention=Attention.SPLASH, moe=moe)
  there = {"device": "TPU v9", "attention": "splash", "grouped_matmul": "mosaic"}
  here = choose.for_reading(model, there)
  assert here.attention is Attention.AUTO and here.moe.grouped_matmul is GroupedMatmul.AUTO
  assert here.moe.exchange is Exchange.AUTO
  same = there | {"device": jax.devices()[0].device_kind, "attention": "reference"}
  assert choose.for_reading(Model(), same).attention is Attention.REFERENCE
  monkeypatch.setattr(platform, "name", lambda: "tpu")
  assert choose.for_reading(model, there) == model


def test_attention_of_no_length_falls_back(monkeypatch):
  """A prompt whose length the run's kernel refuses takes the reference."""
  q, k = jnp.ones((1, 7, 2, 4)), jnp.ones((1, 7, 1, 4))
  y = attention.segment_attention(q, k, k, jnp.ones((1, 7), jnp.int32), Attention.SPLASH)
  assert json.dumps(y.shape) == "[1, 7, 2, 4]"


def test_a_kernel_that_knows_no_part_of_a_sequence_is_not_chosen(monkeypatch):
  """On a TPU splash is, where a part is as long as its blocks."""
  config = toy_config({"data.seq_len": 512, "mesh.context": 2}, group_size=128)
  assert choose.resolve(config, {})[1]["attention"] == "reference"
  named = override(config, {"model.attention": Attention.BLOCKS})
  with pytest.raises(UserError, match=r"model.attention=blocks: it refuses context of .*to auto"):
    choose.check_kernels(named)
  splash = override(config, {"model.attention": Attention.SPLASH})
  monkeypatch.setattr(platform, "name", lambda: "tpu")
  choose.check_kernels(splash)
  short = {"data.seq_len": 128, "model.moe.group_size": 32}
  with pytest.raises(UserError, match="a sequence of 64 tokens"):
    choose.check_kernels(override(splash, short))


def test_a_part_is_compared_with_the_reference(monkeypatch):
  kernel = attention.ATTENTION_KERNELS[Attention.SPLASH]
  function = functools.partial(kernel.function, interpret=True)
  interpreted = kernel._replace(function=function)
  monkeypatch.setitem(attention.ATTENTION_KERNELS, Attention.SPLASH, interpreted)
  config = toy_config({"data.seq_len": 512, "mesh.context": 2}, group_size=128)
  (case,) = choose._attention_cases(config)
  assert 0 < choose.attention_difference(Attention.SPLASH, *case) < 1e-5  # float32
  assert case[0][1] == 256 and case[1][1] == 512
