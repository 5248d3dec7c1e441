"""Names of devices, and how fast they compute and talk: numbers worked out by hand."""

import pytest

from moe_jax.compile import roofline, targets
from moe_jax.compile.program import Collective
from moe_jax.compile.roofline import Group
from moe_jax.errors import UserError
from moe_jax.kernels.chips import CHIPS, chip_of

V5P, V5E, H200 = (targets.parse(name) for name in ("v5p-128", "v5e-64", "h200-64"))


@pytest.mark.parametrize(
  ("name", "shape", "devices"),
  [
    ("v5p-128", (4, 4, 4), 64),  # Google counts cores, two a chip
    ("v4-8", (2, 2, 1), 4),
    ("v5e-256", (16, 16), 256),
    ("v6e-8", (2, 4), 8),
    ("tpu7x-128", (4, 4, 4), 128),  # each of the two cores of a chip is a device
    ("v5p:4x4x12", (4, 4, 12), 192),
    ("h200-64", (8, 8), 64),
    ("b200-4", (1, 4), 4),
  ],
)
def test_names(name, shape, devices):
  target = targets.parse(name)
  assert (target.shape, target.devices) == (shape, devices)
  assert targets.parse(name.upper()).shape == shape


@pytest.mark.parametrize(
  ("name", "word"),
  [
    ("v5p-100", "v5p-128"),
    ("v5q-128", "did you mean v5"),
    ("v5p", "write a kind and a size"),
    ("v5p:4x4", "no such slice"),
    ("h200-12", "hosts of 8"),
    ("h200:4x4", "hosts of 8"),
    ("", "kinds: v4"),
  ],
)
def test_a_wrong_name_is_one_line_with_the_right_ones(name, word):
  with pytest.raises(UserError, match=word) as error:
    targets.parse(name)
  assert f"--topology={name}" in str(error.value) and "\n" not in str(error.value)


def test_gpus_have_no_slices():
  with pytest.raises(UserError, match="--slices=2"):
    targets.parse("h200-64", slices=2)
  assert targets.parse("v5p-128", slices=2).devices == 128


def test_a_torus_is_closed_where_google_closes_it():
  assert all(V5P.wraps(d) for d in range(3))
  assert not any(targets.parse("v5p-64").wraps(d) for d in range(3))  # 2x4x4 is no cube
  assert [targets.parse("v5e-128").wraps(d) for d in range(2)] == [False, True]  # 8x16
  assert "wrapped along 4 and 4 and 4" in str(V5P) and "no wrap" in str(V5E)


def test_kinds_of_jax_are_chips():
  kinds = {"TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
  kinds |= {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100"}
  for kind, name in kinds.items():
    assert chip_of(kind) is CHIPS[name], kind
  assert chip_of("cpu") is None


RING, LINE = Group(4, ((4, True),), 1, 1), Group(4, ((4, False),), 1, 1)
PLANE = Group(16, ((4, True), (4, True)), 1, 1)


def test_a_gather_on_a_torus_takes_both_ways_of_every_dimension():
  whole, link = 4e9, V5P.chip.link
  ring = roofline.seconds("all-gather", whole, RING, V5P)
  assert ring == pytest.approx(whole * 3 / 4 / (2 * link))
  assert roofline.seconds("all-gather", whole, LINE, V5P) == pytest.approx(2 * ring)
  plane = roofline.seconds("all-gather", whole, PLANE, V5P)
  assert plane == pytest.approx(whole * 15 / 16 / (4 * link))
  assert roofline.seconds("reduce-scatter", whole, RING, V5P) == ring
  assert roofline.seconds("all-reduce", whole, RING, V5P) == 2 * ring


def test_an_all_to_all_waits_for_the_middle_of_the_longest_dimension():
  """Of a ring of 4 devices with S bytes each, 2 S/2 cross the middle each way over two links."""
  size, link = 1e9, V5P.chip.link
  ring = roofline.seconds("all-to-all", size, RING, V5P)
  assert ring == pytest.approx(4 * size / 8 / link)
  assert roofline.seconds("all-to-all", size, LINE, V5P) == pytest.approx(2 * ring)
  assert roofline.seconds("all-to-all", size, PLANE, V5P) == pytest.approx(ring)
  long = Group(8, ((8, True),), 1, 1)
  assert roofline.seconds("all-to-all", size, long, V5P) == pytest.approx(2 * ring)


def test_gpus_use_nvlink_inside_a_host_and_the_network_between_hosts():
  size, chip = 1e9, H200.chip
  inside = roofline.seconds("all-to-all", size, Group(8, (), 1, 1), H200)
  assert inside == pytest.approx(size * 7 / 8 / chip.link)
  across = roofline.seconds("all-to-all", size, Group(8, (), 8, 1), H200)
  assert across == pytest.approx(size * 7 / 8 / chip.network)
  # The GPUs of a host fetch what comes from other hosts once, together.
  both = roofline.seconds("all-gather", size, Group(64, (), 8, 1), H200)
  assert both == pytest.approx(max(size * 63 / 64 / chip.link, size * 7 / 8 / (8 * chip.network)))


def test_slices_talk_over_the_data_center():
  two = Group(8, ((4, True),), 1, 2)
  took = roofline.seconds("all-reduce", 1e9, two, V5P)
  assert took == pytest.approx(2 * 1e9 / 2 / (4 * V5P.chip.network))


def times(collectives=(), **changes):
  given = dict(flops=459e12, custom_flops=0.0, memory_bytes=2765e8, cycles=0)
  groups = {("fsdp",): RING, ("expert",): RING}
  return roofline.times(**given | changes, collectives=list(collectives), groups=groups, target=V5P)


def test_a_step_is_bound_by_what_takes_longest():
  assert times().bound == "compute" and times().step == pytest.approx(1.0)
  assert times(memory_bytes=2765e10).bound == "memory"
  by_cycles = times(cycles=int(3 * 1.75e9), custom_flops=459e12)
  assert by_cycles.bound == "compiler's estimate" and by_cycles.step == pytest.approx(4.0)
  weights = Collective("all-gather", ("fsdp",), "", 120 * 10**9, 4)
  beside = times([weights])
  assert beside.bound == "network" and beside.step == pytest.approx(120e9 * 3 / 4 / 180e9 * 4)


def test_rows_and_partial_sums_are_waited_for_and_weights_are_not():
  weights = Collective("all-gather", ("fsdp",), "experts", 10**9, 1)
  rows = Collective("all-to-all", ("expert",), "exchange", 10**9, 1)
  tokens = Collective("all-gather", ("expert",), "exchange", 10**9, 1)
  assert times([weights]).step == times().step
  waited = times([weights, rows, tokens])
  alone = sum(roofline.seconds(one.kind, 1e9, RING, V5P) for one in (rows, tokens))
  assert waited.waited == pytest.approx(alone) and waited.step == pytest.approx(1 + alone)
  assert roofline.waits(Collective("all-reduce", ("tensor",), "attention", 1, 1))


def test_mfu_is_one_where_nothing_but_the_model_is_computed_at_the_peak():
  assert roofline.ceiling(459e12 * 64, 1.0, V5P) == 1.0
