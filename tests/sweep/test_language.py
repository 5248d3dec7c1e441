"""Lists of arms: products, pairs, and wrong ones."""

import pytest

from moe_jax.config import UserError
from moe_jax.sweep import arm, match, product, zipped

FIRST = [arm("a", {"train.steps": 1}), arm("b", {"train.steps": 2}, notes="two")]
SECOND = [arm("x", {"loss.z": 0.1}), arm("y", match("dense", by="total_params"), notes="why")]


def test_a_product_has_every_pair():
  assert [a.name for a in product(FIRST, SECOND)] == ["a-x", "a-y", "b-x", "b-y"]


def test_a_pair_has_the_fields_and_notes_of_both():
  pair = product(FIRST, SECOND)[2]
  assert pair.fields == {"train.steps": 2, "loss.z": 0.1} and pair.notes == ("two",)


def test_a_pair_has_the_twin_of_one():
  pair = product(FIRST, SECOND)[3]
  assert pair.transforms == SECOND[1].transforms and pair.notes == ("two", "why")


def test_zipped_lists_have_one_pair_for_each_place():
  assert [a.name for a in zipped(FIRST, SECOND)] == ["a-x", "b-y"]


def test_lists_of_arms_are_added():
  assert [a.name for a in zipped(FIRST, SECOND) + FIRST] == ["a-x", "b-y", "a", "b"]


def test_a_field_that_both_lists_set_is_refused():
  with pytest.raises(UserError, match=r"a-c: config.train.steps is set twice, to 1 and 3"):
    product(FIRST, [arm("c", {"train.steps": 3})])


def test_zipped_lists_of_different_lengths_are_refused():
  with pytest.raises(UserError, match=r"2 and 1 arms; give each the same number"):
    zipped(FIRST, FIRST[:1])


def test_a_name_that_is_no_folder_is_refused():
  with pytest.raises(UserError, match=r"'a/b': the name is also a folder"):
    arm("a/b")


def test_a_change_that_is_neither_fields_nor_a_twin_is_refused():
  with pytest.raises(UserError, match=r"arm a: 3 is neither"):
    arm("a", 3)
