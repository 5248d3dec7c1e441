"""The drawings: what they hold, and that the same numbers make the same file."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from moe_jax.report import charts, runs, sections, table
from moe_jax.report.charts import Line
from tests.support import report_runs

FIRST = np.array([1.0, 50, 75, 100]), np.array([9.0, 2.2, 2.1, 2.0])


def line(curve=FIRST, name="a", colour=0, thin=()):
  return Line(runs.ArmRuns(name=name, runs=[], colour=colour), curve, thin)


def texts(chart):
  """The texts of a drawing, in their order."""
  return [node.text for node in ElementTree.fromstring(chart.svg).iter() if "}text" in node.tag]


def test_first_steps_do_not_flatten_the_rest():
  low, high = charts.y_range([line()], crop=True)
  assert low < 2.0 and 2.2 < high < 2.6
  assert charts.y_range([line()])[1] > 9.0
  (drawn,) = charts.chart("n", "t", [line()], "step", "loss", (low, high))
  assert "first steps, up to 9, are above" in texts(drawn)
  # A seed of its own counts: its curve stays in the picture.
  thin = line(thin=[(np.array([50.0, 100.0]), np.array([1.0, 0.5]))])
  assert charts.y_range([thin], crop=True)[0] < 0.5


def test_losses_share_a_scale(tmp_path):
  found = runs.read_sweep(report_runs.sweep(tmp_path))
  drawn = [b for b in sections.curves(found, table.compare_arms(found)).blocks if hasattr(b, "svg")]
  assert [chart.name for chart in drawn] == ["loss_training", "loss_steps", "loss_time"]
  x_labels = ("step", "step", "seconds of training")
  ticks = [
    texts(chart)[texts(chart).index(x) + 1 : texts(chart).index("nats per token")]
    for chart, x in zip(drawn, x_labels, strict=True)
  ]
  assert len(ticks[0]) > 2 and ticks[0] == ticks[1] == ticks[2]
  assert [text for text in texts(drawn[1]) if text in ("dense", "moe", "bad", "target")] == [
    "target",
    "dense",
    "moe",
    "bad",
  ]


def test_an_arm_has_its_colour_and_a_seed_a_thin_line_of_it():
  lines = [line(thin=[FIRST]), line(name="b", colour=7)]
  svg = charts.chart("n", "t", lines, "step", "loss", (0, 9))[0].svg.decode()
  first, second = charts.COLOURS[:2]
  assert f"stroke: {first}; stroke-opacity: 0.4; stroke-width: 0.8" in svg
  assert f"stroke: {first}; stroke-width: 2" in svg
  assert f"stroke-dasharray: 8,4; stroke-dashoffset: 0; stroke: {second}; stroke-width: 2" in svg


@pytest.mark.parametrize(
  ("name", "shown"),
  [
    ("_a", "_a"),  # which matplotlib would leave out of a legend
    ("cost $x^$", "cost $x^$"),  # which looks like a formula to it
    ("\u2603\u4e2d", "\u2603\u4e2d"),  # not in its font
    ("</text><script>\x1b", "</text><script>\ufffd"),
    ("a" * 9000, "a" * 39 + "…"),
  ],
)
def test_any_name_is_shown_as_text(name, shown):
  (drawn,) = charts.chart("n", "t", [line(name=name)], "step", "loss", (0, 9))
  assert shown in texts(drawn)


def test_the_same_numbers_are_the_same_file():
  lines = [line(), line(name="b", colour=1)]
  first, second = (charts.chart("n", "t", lines, "step", "loss", (0, 9))[0].svg for _ in range(2))
  assert first == second and b"<dc:date>" not in first


@pytest.mark.parametrize("values", [[], [np.nan] * 4, [np.inf] * 4])
def test_without_a_number_there_is_no_chart(values):
  empty = line((np.arange(len(values), dtype=float), np.array(values)))
  assert charts.chart("n", "t", [empty], "step", "loss", charts.y_range([empty])) == []


def test_a_divergence_ends_a_curve_alone():
  broken = line((FIRST[0], np.array([9.0, np.inf, np.nan, 2.0])))
  assert charts.chart("n", "t", [broken], "step", "loss", charts.y_range([broken]))


def test_binned():
  x, y = charts.binned((np.arange(10.0), np.arange(10.0) ** 2), 5)
  np.testing.assert_allclose(x, [0.5, 2.5, 4.5, 6.5, 8.5])
  np.testing.assert_allclose(y[:2], [0.5, 6.5])
  assert all(part.shape == (0,) for part in charts.binned((np.zeros(0), np.zeros(0)), 5))
