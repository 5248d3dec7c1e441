"""The fields of a run: what stands with each, and what config.json makes of them."""

import dataclasses
import enum
import importlib
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.compile import targets
from moe_jax.config import (
  Config,
  Dispatch,
  Exchange,
  Mesh,
  Model,
  MoE,
  QKNorm,
  Remat,
  Router,
  override,
)
from moe_jax.config.fields import Choice, flatten, walk
from moe_jax.config.run import from_json, to_json
from moe_jax.errors import UserError
from moe_jax.moe import validation
from tests.support.toys import ROOT, lower_step, set_up, slow_unless, toy_batch, toy_config

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def module(name):
  return importlib.import_module(f"configs.{name.partition(':')[0]}")


# With each word of those that have a layout for several kinds of devices.
LAYOUTS = [f"{name}:{word}" for name in CONFIGS for word in getattr(module(name), "LAYOUTS", {})]
CONFIGS = [name for name in CONFIGS if not hasattr(module(name), "LAYOUTS")] + LAYOUTS


def load(name):
  _, _, word = name.partition(":")
  return module(name).get_config(*[word] if word else [])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_validates_and_survives_json(name):
  config = load(name)
  validation.validate(config)
  assert from_json(to_json(config)) == config
  doc = module(name).__doc__
  for heading in ("Question", "Command", "Hardware", "Time", "Expect"):
    assert f"\n{heading}  " in doc, f"configs/{name}.py does not state {heading}"


def test_the_shipped_configs_are_there():
  expected = {"tiny_moe", "tiny_dense", "laptop_moe", "switch_small", "mixtral_small", "debug"}
  expected |= {"mixtral_8x7b:v5p_128", "mixtral_8x7b:h200_64", "mixtral_8x22b:v5p_256"}
  expected |= {"qwen3_30b_a3b:h200_8", "qwen3_30b_a3b:v5e_256", "gpt_oss_20b:h200_8"}
  expected |= {"olmoe_1b_7b:v5p_32", "deepseek_v3:v5p_512", "deepseek_v3:v5p_1024"}
  assert expected <= set(CONFIGS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_suits_the_devices_that_its_word_names(name):
  """--topology=v5p-128 of v5p_128, as many devices as the mesh takes, and a word is named."""
  config, word = load(name), name.partition(":")[2]
  target = targets.parse(word.replace("_", "-"))
  resolved = validation.resolve_mesh(config, target.devices)
  assert resolved.mesh == dataclasses.replace(config.mesh, data=1)  # no copies of the weights
  docs = " ".join(module(name).__doc__.split())
  assert word in docs and f"--topology={target.name}" in docs
  with pytest.raises(ValueError, match=f"'v5p_3' is not one of: .*{word}"):
    module(name).get_config("v5p_3")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_shapes_of_the_published_model(name):
  published = module("published").get_config(name.partition(":")[0])
  free = ("moe.capacity", "moe.dispatch", "moe.exchange", "attention", "remat")
  changed = {
    field
    for field, value in flatten(load(name).model).items()
    if value != flatten(published.model)[field]
  }
  assert not [field for field in changed if not field.startswith(free)]


def test_no_limit_is_strict_json():
  config = toy_config(capacity_factor=math.inf)
  text = to_json(config)
  values = json.loads(text, parse_constant=pytest.fail)  # Infinity, NaN
  assert values["model"]["moe"]["capacity_factor"] == "inf" and values["format"] == 5
  assert from_json(text) == config
  assert flatten(config)["model.moe.capacity_factor"] == "inf"


def stored(number, **moe):
  return json.dumps(({"format": number} if number else {}) | {"model": {"moe": moe}})


def test_a_stored_config_of_before_means_what_it_meant():
  """Format 0 has no number, and a capacity factor of 0 was no limit."""
  fields = dict(num_experts=4, capacity_factor=0.0, eval_capacity_factor=2.0)
  moe = from_json(stored(0, **fields)).model.moe
  assert (moe.capacity_factor, moe.eval_capacity_factor) == (math.inf, 2.0)
  moe = from_json(stored(1, **fields)).model.moe
  assert moe.capacity_factor == 0.0  # which validate() refuses
  with pytest.raises(UserError, match="of format 6, made by a newer moe_jax"):
    from_json(stored(6, **fields))


def test_the_norms_of_latents_had_the_epsilon_of_the_others():
  stored = {"model": {"norm_eps": 1e-5, "latent": {"kv_dim": 8}}}
  model = from_json(json.dumps({"format": 3} | stored)).model
  assert model.latent.norm_eps == model.norm_eps == 1e-5
  assert from_json(json.dumps({"format": 4} | stored)).model.latent.norm_eps == 1e-6


@pytest.mark.parametrize(("word", "meant"), [(True, QKNorm.HEAD), (False, QKNorm.NONE)])
def test_a_stored_norm_of_queries_and_keys_was_a_bool(word, meant):
  text = json.dumps({"format": 2, "model": {"qk_norm": word}})
  assert from_json(text).model.qk_norm is meant


def test_the_column_of_a_text_had_another_name():
  assert from_json('{"format": 4, "data": {"text_field": "body"}}').data.column == "body"
  with pytest.raises(UserError, match=r"no field config.data.text_field; it is config.data.column"):
    override(toy_config(), {"data.text_field": "body"})


def test_a_stored_cache_folder_is_dropped():
  """Programs in the cache are run, so a workdir from elsewhere must not name it."""
  config = toy_config()
  values = json.loads(to_json(config))
  values["data"]["cache_dir"] = "/tmp/elsewhere"
  for number in (0, 1):
    assert from_json(json.dumps(values | {"format": number})) == config
  with pytest.raises(UserError, match=r"no field config.data.cache_dir; .*--cache_dir"):
    from_json(json.dumps(values))


def test_an_int_becomes_a_float_where_one_belongs():
  config = from_json('{"loss": {"z": 1}, "train": {"steps": 2}}')
  config = override(config, {"model.moe.capacity_factor": 2})
  config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, load_balance=0))
  for value in (config.loss.z, config.model.moe.capacity_factor, config.loss.load_balance):
    assert type(value) is float
  assert type(config.train.steps) is int


@pytest.mark.parametrize(("fields", "why"), [
  ({"train.step": 3}, r"here: .*train.step; the nearest is config.train.steps"),
  ({"model.remat": "dot"}, r"config.model.remat='dot' is not one of: none"),
  ({"model.moe.router": "best"}, "router='best' is not one of: switch"),
  ({"model.moe": 4}, "here: there is no field config.model.moe"),
  ({"loss": MoE()}, "here: there is no field config.loss.num_experts; the nearest is"),
])  # fmt: skip
def test_override_refuses(fields, why):
  with pytest.raises(UserError, match=why):
    override(toy_config(), fields, "here")


def test_an_override_takes_members_and_the_words_of_config_json():
  base = Config()
  flat = flatten(base) | {"model.moe.capacity_factor": "inf", "model.remat": "dots"}
  config = override(base, flat, "here")
  assert flatten(config) == flat and config.model.remat is Remat.DOTS
  config = override(base, {"model.moe.router": Router.SINKHORN}, "here")
  assert config.model.moe.router is Router.SINKHORN
  assert base == Config()  # a copy was changed


def test_an_override_takes_sections():
  config = override(Config(), {"model.moe": MoE(num_experts=4), "model.moe.top_k": 3})
  assert config.model == Model(moe=MoE(num_experts=4, top_k=3))


def test_a_config_never_changes_and_is_a_key():
  config = toy_config()
  with pytest.raises(dataclasses.FrozenInstanceError, match="top_k"):
    config.model.moe.top_k = 1
  assert {config: "here"}[from_json(to_json(config))] == "here"
  assert hash(override(config, {"model.moe.top_k": 1})) != hash(config)


def test_every_field_says_what_it_is():
  """What docs/config.md and --help are made of, and the bounds that validate() checks."""
  for name, field, default in walk(Config()):
    assert field.metadata["help"].endswith("."), name
    bounds = field.metadata["bounds"]
    if field.type in (int, float):
      assert max(bounds.at_least, bounds.above) > -math.inf, f"{name} has no lower bound"
      assert not bounds.wrong(default), name
    else:
      assert not str(bounds), name
    assert not issubclass(field.type, enum.Enum) or issubclass(field.type, Choice), name


def test_a_word_is_a_value_with_a_meaning():
  assert Dispatch("grouped") is Dispatch.GROUPED and "never drops" in Dispatch.GROUPED.meaning
  assert Dispatch.GROUPED.value == "grouped"


def test_unknown_field_in_json():
  text = to_json(toy_config()).replace('"top_k"', '"topk"')
  with pytest.raises(UserError, match=r"topk; the nearest is config.model.moe.top_k"):
    from_json(text)


def test_what_needs_no_jax():
  """What a plan, a report and --help read, so that they run anywhere and at once."""
  files = "config.docs", "config.checks", "start.command_line", "storage.workdir", "report"
  modules = [f"moe_jax.{name}" for name in files]
  code = f"import sys; sys.modules['jax'] = None; import {', '.join(modules)}"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_field_is_optional():
  for name, field, _ in walk(Config()):
    assert isinstance(field.type, type), name


def shrink(config):
  """The same structure in a few thousand parameters: pattern, routing, precision and remat stay."""
  model, moe, latent = config.model, config.model.moe, config.model.latent
  if latent.kv_dim:
    small = dict(kv_dim=8, query_dim=8 * bool(latent.query_dim), rotary_dim=2, value_dim=2)
    config = override(config, {f"model.latent.{name}": size for name, size in small.items()})
  if moe.exchange is Exchange.RAGGED:  # which no CPU has
    config = override(
      config, {"model.moe.exchange": Exchange.ALL_TO_ALL, "model.moe.exchange_factor": 0.0}
    )
  return override(
    config,
    {
      "model.num_kv_heads": 2,
      "model.num_heads": 2 * model.num_heads // model.num_kv_heads,
      "model.dim": 16,
      "model.head_dim": 4,
      "model.ffn_dim": 8,
      "model.vocab_size": 264,
      "model.num_layers": moe.first_dense + 2 * moe.every,
      "model.moe.expert_dim": 8,
      "model.moe.group_size": min(moe.group_size, 16),
      "data.seq_len": 16,
      "data.batch_size": 8 * min(config.train.accumulation, 2),
      "train.accumulation": min(config.train.accumulation, 2),
    },
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_every_config_can_be_traced(name):
  config = override(shrink(load(name)), {"mesh": Mesh(data=8)})
  lower_step(config)


@pytest.mark.parametrize("name", slow_unless(["mixtral_8x7b:v5p_128"], ["tiny_deepseek", *LAYOUTS]))
def test_a_config_takes_a_step_at_toy_size(name):
  config = shrink(load(name))
  mesh, state, step = set_up(config, dict(expert=4, data=2))
  with jax.set_mesh(mesh):
    _, metrics = step(state, sharding.to_global(toy_batch(config), mesh))
  # A uniform guess, plus half the variance (1 at most) of a new model's logits.
  assert abs(float(metrics["loss"]) - np.log(264)) < 0.8
  assert float(metrics["grad_norm"]) > 1e-3
  assert "load_ZE" in metrics
