"""Overrides of config fields by name."""

import pytest

from moe_jax import command_line
from moe_jax.config import Router, UserError
from tests.support.toys import toy_config


@pytest.mark.parametrize("router", [Router.SINKHORN, "sinkhorn"])
def test_override_takes_members_and_values(router):
  config = toy_config()
  changed = command_line.override(config, {"model.moe.router": router, "train.steps": 3}, "here")
  assert changed.model.moe.router is Router.SINKHORN and changed.train.steps == 3
  assert config.model.moe.router is Router.TOPK


@pytest.mark.parametrize(("fields", "why"), [
  ({"train.step": 3}, r"here: .*train.step; the nearest is config.train.steps"),
  ({"model.moe.router": "best"}, "router='best' is not one of: switch"),
])  # fmt: skip
def test_override_refuses(fields, why):
  with pytest.raises(UserError, match=why):
    command_line.override(toy_config(), fields, "here")


def test_words_become_values_of_the_fields_types():
  words = ["model.qk_norm=true", "model.moe.router=hash", "loss.z=1", "data.path=a=b"]
  assert command_line.parse_overrides(words) == {
    "model.qk_norm": True, "model.moe.router": Router.HASH, "loss.z": 1.0, "data.path": "a=b",
  }  # fmt: skip


@pytest.mark.parametrize(("word", "why"), [
  ("train.step=3", "nearest is config.train.steps"), ("train.steps=many", "'many' is not of int"),
  ("model.moe.router=best", "not of switch, topk"), ("model.qk_norm=1", "qk_norm=true"),
  ("train.steps", "write --override=train.steps=VALUE"),
])  # fmt: skip
def test_a_wrong_word_is_refused(word, why):
  with pytest.raises(UserError, match=why):
    command_line.parse_overrides([word])
