"""Where the parameters stand."""

import dataclasses

import jax
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.moe import routing
from tests.support.toys import mesh_of, set_up, toy_config


def test_a_parameter_is_declared_once():
  one = routing.router_matrix("noise_DE", 0.5)  # another initial value says nothing else of it
  assert sharding.declared("noise_DE") == one and sharding.declared("gate_EDF") is None
  assert sharding.param_spec("noise_DE", (10, 4), mesh_of(fsdp=2)) == jax.sharding.PartitionSpec()
  with pytest.raises(ValueError, match="noise_DE is declared twice"):
    dataclasses.replace(one, decays=True)


def test_parameters_are_sharded_by_their_letters():
  _, state, _ = set_up(toy_config(), dict(expert=2, fsdp=2, tensor=2))
  leaves = nnx.to_flat_state(state.params)
  shapes = {path[-1]: leaf[...].addressable_shards[0].data.shape for path, leaf in leaves}
  assert shapes["gate_EDF"] == (2, 2, 5, 9) and shapes["down_EFD"] == (2, 2, 9, 5)
  # D = 10 is not split over fsdp 2 x expert 2 devices, so over fsdp alone.
  assert shapes["q_DHA"] == (2, 5, 2, 6) and shapes["embed_VD"] == (12, 5)
  assert shapes["router_DE"] == (2, 10, 4)
  with pytest.raises(AssertionError, match="two dimensions on one mesh axis"):
    sharding.spec("HF")


def test_matrices_are_split_over_expert_too_where_they_can_be():
  mesh, P = mesh_of(fsdp=2, expert=2, tensor=2), jax.sharding.PartitionSpec
  assert sharding.param_spec("q_DHA", (12, 4, 6), mesh) == P(("expert", "fsdp"), "tensor", None)
  assert sharding.param_spec("down_FD", (3, 14, 12), mesh) == P(None, "tensor", ("expert", "fsdp"))
  assert sharding.param_spec("q_DHA", (10, 4, 6), mesh) == P("fsdp", "tensor", None)
  assert sharding.param_spec("up_EDF", (4, 12, 6), mesh) == P("expert", "fsdp", "tensor")
  assert sharding.param_spec("norm_D", (12,), mesh) == P("fsdp")
  # Without a D, along a latent: wholly, over fsdp alone, not at all.
  for size, split in ((12, ("expert", "fsdp")), (10, "fsdp"), (9, None)):
    assert sharding.param_spec("kv_up_WHY", (size, 4, 6), mesh) == P(split, "tensor", None)
  assert sharding.param_spec("q_DHA", (12, 4, 6), mesh, spread=False) == P("fsdp", "tensor", None)
