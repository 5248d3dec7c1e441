"""Where a piece of a parameter lies in a tensor of another layout."""

import numpy as np
import pytest

from moe_jax.hf import layout


@pytest.mark.parametrize("layouts", ["(HA)D", "D(HA)", "AHD", "(AD)H"])
def test_a_piece_of_a_tensor_is_the_piece_of_the_whole(layouts):
  """Every range of every letter, against a transpose of the whole."""
  sizes = {"D": 4, "H": 3, "A": 2}
  ours = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
  part = layout.Part(("q_DHA",), (), 0)
  tensor = layout.Tensor("w", layouts, (part,), sizes)
  stored = tensor.pack([ours])
  assert stored.shape == tensor.shape
  for d, h, a in np.ndindex(4, 3, 2):
    wanted = {"D": slice(d, 4), "H": slice(0, h + 1), "A": slice(a, a + 1)}
    got = tensor.unpack(lambda _, ranges: stored[ranges], part, wanted)
    np.testing.assert_array_equal(got, ours[d:4, : h + 1, a : a + 1])


@pytest.mark.parametrize("layouts", ["E(2F)D", "ED(F2)"])
def test_a_pair_of_parameters_shares_a_tensor(layouts):
  rng = np.random.default_rng(0)
  gate, up = (rng.normal(size=(3, 4, 5)).astype(np.float32) for _ in range(2))
  parts = tuple(layout.Part((name,), (), half) for half, name in enumerate(("g_EDF", "u_EDF")))
  tensor = layout.Tensor("w", layouts, parts, {"E": 3, "D": 4, "F": 5, "2": 2})
  stored = tensor.pack([gate, up])
  wanted = {"E": slice(1, 3), "D": slice(0, 4), "F": slice(2, 5)}
  for part, whole in zip(parts, (gate, up), strict=True):
    got = tensor.unpack(lambda _, ranges: stored[ranges], part, wanted)
    np.testing.assert_array_equal(got, whole[1:3, :, 2:5])


def test_parts_of_a_letter_stand_one_after_another():
  """Every range of the letter, which may begin and end in any of the parts."""
  ours = np.random.default_rng(0).normal(size=(4, 3, 9)).astype(np.float32)
  cuts = slice(0, 2), slice(2, 4), slice(4, 7), slice(7, 9)
  parts = [layout.Part(("q_DJY",), (), 0, cut) for cut in cuts]
  sizes = {"D": 4, "J": 3, "Y": 9}
  first, second = (
    layout.Tensor(name, "(JY)D", tuple(held), sizes)
    for name, held in (("qkv", parts[:3]), ("z", parts[3:]))
  )
  stored = {tensor.name: tensor.pack([ours] * len(tensor.parts)) for tensor in (first, second)}
  blocks = [ours[..., cut].transpose(1, 2, 0).reshape(-1, 4) for cut in cuts]
  np.testing.assert_array_equal(stored["qkv"], np.concatenate(blocks[:3]))
  assert first.shape == (21, 4) and second.shape == (6, 4)
  where = layout.by_parameter([first, second])[("q_DJY",)]
  for start, stop in ((a, b) for a in range(9) for b in range(a + 1, 10)):
    index = (slice(1, 4), slice(1, 3), slice(start, stop))
    got = np.full((3, 2, stop - start), np.nan, np.float32)
    for at, values in layout.pieces(("q_DJY",), index, where, lambda n, r: stored[n][r]):
      got[:, :, at[2] : at[2] + values.shape[2]] = values
    np.testing.assert_array_equal(got, ours[index])
