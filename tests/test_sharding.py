"""Where the parameters stand."""

import dataclasses

import jax
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.moe import routing
from tests.support.toys import (
  set_up,
  toy_config,
)


def test_a_parameter_is_declared_once():
  one = routing.router_matrix("noise_DE", 0.5)  # another initial value says nothing else of it
  assert sharding.declared("noise_DE") == one and sharding.declared("gate_EDF") is None
  assert sharding.param_spec("noise_DE", 2) == jax.sharding.PartitionSpec()
  with pytest.raises(ValueError, match="noise_DE is declared twice"):
    dataclasses.replace(one, decays=True)


def test_parameters_are_sharded_by_their_letters():
  _, state, _ = set_up(toy_config(), dict(expert=2, fsdp=2, tensor=2))
  leaves = nnx.to_flat_state(state.params)
  shapes = {path[-1]: leaf[...].addressable_shards[0].data.shape for path, leaf in leaves}
  assert shapes["gate_EDF"] == (2, 2, 5, 9) and shapes["down_EFD"] == (2, 2, 9, 5)
  assert shapes["q_DHA"] == (2, 5, 2, 6) and shapes["embed_VD"] == (12, 5)
  assert shapes["router_DE"] == (2, 10, 4)
  with pytest.raises(AssertionError, match="two dimensions on one mesh axis"):
    sharding.spec("HF")
