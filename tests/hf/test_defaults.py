"""What a family takes where a config.json lacks a field, or has null: as transformers does."""

import copy
import json

import pytest

from moe_jax.errors import UserError
from moe_jax.hf import families, fields
from tests.support.hf_models import COMMON, CONFIGS, transformers


def values(config):
  return json.loads(config.to_json_string(use_diff=False))


def without(file, name, null):
  """The file with null for a field, or without it; None where transformers refuses that."""
  changed = copy.deepcopy(file)
  changed[name] = None
  if not null:
    del changed[name]
  try:
    return changed, values(transformers.CONFIG_MAPPING[file["model_type"]].from_dict(changed))
  except Exception:  # whatever the class of the family raises
    return None


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_field_that_is_missing_is_theirs(name, null):
  """Ours of the file without it is ours of all that transformers makes of that file."""
  file = values(transformers.AutoConfig.for_model(**(COMMON | CONFIGS[name])))
  family, compared = families.family_of(file, "config.json"), 0
  for field in file.keys() - {"model_type"}:
    found = without(file, field, null)
    if found is None:
      continue
    changed, whole = found
    try:
      ours = fields.to_model(family, changed, "config.json")[0]
    except UserError as error:
      assert " is missing" in str(error)  # a size, which is not guessed
      continue
    assert ours == fields.to_model(family, whole, "config.json")[0], field
    compared += 1
  assert compared > 10
