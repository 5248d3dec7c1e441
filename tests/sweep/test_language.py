"""Lists of arms: products, pairs, and wrong ones."""

import pytest

from moe_jax.config import UserError
from moe_jax.sweep import arm, match, product, zipped


def test_product_and_zip():
  first = [arm("a", {"train.steps": 1}), arm("b", {"train.steps": 2}, notes="two")]
  second = [arm("x", {"loss.z": 0.1}), arm("y", match("dense", by="total_params"), notes="why")]
  both = product(first, second)
  assert [a.name for a in both] == ["a-x", "a-y", "b-x", "b-y"]
  assert both[2].fields == {"train.steps": 2, "loss.z": 0.1} and both[2].notes == ("two",)
  assert both[3].transforms == second[1].transforms and both[3].notes == ("two", "why")
  assert [a.name for a in zipped(first, second)] == ["a-x", "b-y"]
  assert [a.name for a in zipped(first, second) + first] == ["a-x", "b-y", "a", "b"]


def test_wrong_lists():
  steps = [arm("a", {"train.steps": 1}), arm("b", {"train.steps": 2})]
  with pytest.raises(UserError, match=r"a-c: config.train.steps is set twice, to 1 and 3"):
    product(steps, [arm("c", {"train.steps": 3})])
  with pytest.raises(UserError, match=r"2 and 1 arms; give each the same number"):
    zipped(steps, steps[:1])
  with pytest.raises(UserError, match=r"'a/b': a name is a folder"):
    arm("a/b")
  with pytest.raises(UserError, match=r"arm a: 3 is neither"):
    arm("a", 3)
