"""Overrides of config fields by name."""

import pytest

from moe_jax import command_line
from moe_jax.config import Router, UserError
from tests.support.toys import toy_config


def test_override_takes_members_and_values():
  config = toy_config()
  for router in (Router.SINKHORN, "sinkhorn"):
    changed = command_line.override(config, {"model.moe.router": router, "train.steps": 3}, "here")
    assert changed.model.moe.router is Router.SINKHORN and changed.train.steps == 3
  assert config.model.moe.router is Router.TOPK
  with pytest.raises(UserError, match=r"here: .*train.step; the nearest is config.train.steps"):
    command_line.override(config, {"train.step": 3}, "here")
  with pytest.raises(UserError, match="router='best' is not one of: switch"):
    command_line.override(config, {"model.moe.router": "best"}, "here")
