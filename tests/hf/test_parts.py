"""The kinds of layers in a config.json."""

import pytest

from moe_jax.hf import parts

L, F = parts.LINEAR, parts.FULL


def test_layers_of_the_delta_rule_are_said_by_a_list_or_by_an_interval():
  by_interval = parts.delta_types({"num_hidden_layers": 7, "full_attention_interval": 3})
  assert by_interval == [L, L, F, L, L, F, L]
  by_list = parts.delta_types({"num_hidden_layers": 4, "layer_types": [L, F, L, F]})
  assert by_list == [L, F, L, F]
  assert [parts.global_every(types, L) for types in (by_interval, by_list, [L, L])] == [3, 2, 0]


@pytest.mark.parametrize("types", [[F, L, F], [L, F, F], [L, F, L, L, F]])
def test_other_orders_are_refused(types):
  with pytest.raises(ValueError, match="is no repetition of linear_attention"):
    parts.global_every(types, L)
