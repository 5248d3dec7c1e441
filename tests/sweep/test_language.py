"""Lists of arms: products, pairs, and wrong ones."""

import pytest

from moe_jax.errors import UserError
from moe_jax.sweep import arm, match, product, zipped

FIRST = [arm("a", {"train.steps": 1}), arm("b", {"train.steps": 2}, notes="two")]
SECOND = [arm("x", {"loss.z": 0.1}), arm("y", match("dense", by="total_params"), notes="why")]


def test_a_product_has_every_pair_with_the_fields_notes_and_twins_of_both():
  pairs = product(FIRST, SECOND)
  assert [a.name for a in pairs] == ["a-x", "a-y", "b-x", "b-y"]
  assert pairs[2].fields == {"train.steps": 2, "loss.z": 0.1} and pairs[2].notes == ("two",)
  assert pairs[3].transforms == SECOND[1].transforms and pairs[3].notes == ("two", "why")


def test_zipped_lists_have_one_pair_for_each_place_and_lists_are_added():
  names = [a.name for a in zipped(FIRST, SECOND) + FIRST]
  assert names == ["a-x", "b-y", "a", "b"]


@pytest.mark.parametrize(
  ("make", "why"),
  [
    (
      lambda: product(FIRST, [arm("c", {"train.steps": 3})]),
      r"a-c: config.train.steps is set twice, to 1 and 3",
    ),
    (lambda: zipped(FIRST, FIRST[:1]), r"2 and 1 arms; give each the same number"),
    (lambda: arm("a/b"), r"'a/b': the name is also a folder"),
    (lambda: arm("a", 3), r"arm a: 3 is neither"),
  ],
)
def test_what_makes_no_arm_is_refused(make, why):
  with pytest.raises(UserError, match=why):
    make()
