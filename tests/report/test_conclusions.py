"""The sentence at the top of each section, against runs whose answer is known by hand."""

import pytest

from moe_jax.report import charts, conclusions, curves, table
from moe_jax.report.blocks import ArmName
from moe_jax.report.runs import ArmRuns, Run, Study

CLEAR = {"a": (1.0, 1.2, 1.4), "b": (1.5, 1.71, 1.89)}  # b - a: 0.5, 0.51, 0.49
TIE = {"a": (1.0, 1.2, 1.4), "b": (1.5, 0.9, 1.5)}  # b - a: 0.5, -0.3, 0.1: 0.1 ± 0.2309


def study(losses, target="", **metrics):
  """Arms {name: losses of seeds 0, 1, ...}; metrics {name of one layer: {arm: values}}."""
  arms = []
  for arm, values in losses.items():
    runs = []
    for seed, loss in enumerate(values):
      line = {"step": 10} | {name: [found[arm][seed]] for name, found in metrics.items()}
      validation = [{"step": 5, "loss": loss + 1}, {"step": 10, "loss": loss}]
      fields = {"train": [line], "validation": validation}
      runs.append(Run(name=f"{arm}/{seed}", seed=seed, status="finished", **fields))
    arms.append(ArmRuns(name=arm, runs=runs))
  return Study(title="t", arms=arms, target_arm=target)


def test_a_clear_win():
  said = conclusions.results(study(CLEAR))
  assert said.startswith(
    "a ends lowest, at 1.2000 ± 0.2000 nats per token (± standard deviation over 3 seeds). "
    "b is higher by more than twice the standard error of the paired difference: by 0.5000 ± 0.0058"
  )
  assert "guess" not in said


def test_a_tie():
  said = conclusions.results(study(TIE))
  assert "b is not clearly higher: the paired difference, 0.1000 ± 0.2309 nats per token," in said
  assert "more than twice" not in said


def test_one_seed():
  said = conclusions.results(study({"a": (1.0,), "b": (1.5,)}))
  assert "1.0000 nats per token (one seed)" in said and "±" not in said
  assert "The next, b, is higher by 0.5000 nats per token." in said
  assert said.endswith("One seed: no uncertainty is known.")


def test_two_seeds_are_few():
  said = conclusions.results(study({"a": (1.0, 1.2), "b": (1.5, 1.71)}))
  assert "more than twice" in said and said.endswith("the standard error is itself a rough guess.")


def test_three_arms_and_a_target():
  third = CLEAR | {"c": (1.1, 1.1, 1.45)}  # c - a: 0.1, -0.1, 0.05
  said = conclusions.results(study(third, target="b"))
  assert "c is not clearly higher" in said and "b is higher by more than twice" in said
  assert "Every other arm is clearly lower than b." in said  # c - b: -0.4, -0.61, -0.44


def test_nothing_finished_and_one_arm():
  assert conclusions.results(Study(title="t", arms=[ArmRuns(name="a", runs=[])])) == (
    conclusions.NOTHING
  )
  said = conclusions.results(study({"a": (1.0, 1.2)}))
  assert said.endswith("There is no other arm to compare it with.")


def test_a_divergence_is_said():
  said = conclusions.results(study({"a": (1.0, 1.1), "b": (float("nan"), 1.0)}))
  assert said.startswith("a ends lowest") and "loss of b is not a finite number" in said


def test_seeds_that_no_two_arms_share():
  found = study(CLEAR)
  for run in found.arms[1].runs:
    run.seed += 10
  assert "no uncertainty is known" in conclusions.results(found)


def test_steps_to_the_target():
  found = study(CLEAR, target="b")  # ends at 1.7; a is there where its curve falls by 1 in 5 steps
  said = conclusions.curves(found, table.compare_arms(found))
  # Seeds of a are at 1.7 at steps 6.5, 7.5 and 8.5.
  assert "is a, after 8 ± 1 steps" in said and "1.33 times as fast as b" in said
  found = study(CLEAR, target="a")
  assert "No other arm reaches the target, 1.2000" in conclusions.curves(
    found, table.compare_arms(found)
  )
  found = study(CLEAR)
  assert "No target arm" in conclusions.curves(found, table.compare_arms(found))


def test_balance():
  vio = {"a": (0.1, 0.2, 0.3), "b": (1.1, 1.21, 1.29)}
  drop = {"a": (0.0, 0.0, 0.0), "b": (0.1, 0.1, 0.1)}
  dead = {"a": (1, 1, 1), "b": (1, 1, 1)}
  metrics = {"max_vio_Z": vio, "drop_fraction_Z": drop, "window_dead_experts_Z": dead}
  first, second, third = conclusions.balance(study(CLEAR, **metrics)).split("\n")
  assert "a is the best balanced: its MaxVio is 0.20 ± 0.10" in first and "by 1.00 ± 0.01" in first
  assert second == "Most assignments are dropped by b: 10.0 ± 0.0% over 3 seeds; the others: none."
  assert "a and b: 1.0 ± 0.0 over 3 seeds" in third  # a tie has no winner
  metrics["drop_fraction_Z"] = {"a": (0, 0, 0), "b": (0, 0, 0)}
  assert "No arm drops anything." in conclusions.balance(study(CLEAR, **metrics))


def test_capacity_domains_and_causality():
  found = study({"a": (1.0, 1.0), "b": (1.0, 1.0)})
  for arm, cost, gap in zip(found.arms, (0.1, 0.3), (0.0, 0.05), strict=True):
    for run in arm.runs:
      points = [{"capacity_factor": 1, "loss": 1 + cost}, {"capacity_factor": "inf", "loss": 1.0}]
      run.eval = {"capacity": points, "causal": {"gap": gap}}
      run.eval["domains"] = {"code": {"bits_per_byte": cost}, "prose": {"bits_per_byte": -cost}}
      run.routing = {"domain_separation_Z": [cost]}
  assert "factor of 1 costs a the least: its loss is 0.1000" in conclusions.capacity(found)
  said = conclusions.domains(found)
  assert "in code a; in prose b." in said and "routers of b read later tokens" in said
  assert "experts of b differ most" in conclusions.specialisation(found)


def test_arms_without_a_usable_run_are_named_where_they_could_have_a_number():
  vio = {"a": (0.1, 0.2, 0.3), "b": (1.1, 1.21, 1.29)}
  found = study(CLEAR, target="b", max_vio_Z=vio)
  for _, run in found.runs:
    points = [{"capacity_factor": factor, "loss": 1.0} for factor in (1, "inf")]
    run.eval = {"capacity": points, "causal": {"gap": 0.0}, "loss": run.validation[-1]["loss"]}
    run.routing = {"domain_separation_Z": [0.1]}
  lost = Run(name="c", seed=0, status="damaged")
  never = ArmRuns(name="d", runs=[], overrides={"model.moe.num_experts": 0})
  found.arms += [ArmRuns(name="c", runs=[lost]), never]
  compared = table.compare_arms(found)
  for said in (conclusions.results(found), conclusions.curves(found, compared),
               conclusions.domains(found)):  # fmt: skip
    assert said.count("c and d are missing here, without a usable run") == 1, said
    assert "Not every finished run" not in said
  for conclude in (conclusions.balance, conclusions.capacity, conclusions.specialisation):
    assert conclude(found).count(" missing here") == conclude(found).count("c is missing here") == 1


def test_first_steps_do_not_flatten_the_rest():
  points = [(float(x), y) for x, y in ((1, 9.0), (50, 2.2), (75, 2.1), (100, 2.0))]
  line = charts.Line(ArmName("a", 0), points)
  low, high = charts.y_range([line], crop=True)
  assert low < 2.0 and 2.2 < high < 2.6
  assert charts.y_range([line])[1] > 9.0
  axes = charts.Axes(x="step", y="loss", y_range=(low, high))
  assert "first steps, up to 9, are above" in charts.chart("n", "t", [line], axes)[0].svg
  # A seed of its own counts: its curve stays in the picture.
  thin = charts.Line(ArmName("a", 0), points, thin=[[(50.0, 1.0), (100.0, 0.5)]])
  assert charts.y_range([thin], crop=True)[0] < 0.5


def test_losses_share_a_scale():
  found = study(CLEAR)
  for run in (run for _, run in found.runs):
    run.train[0] |= {"loss": 3.0, "seconds": 10.0}
  drawn = [b for b in curves.section(found, table.compare_arms(found)).blocks if hasattr(b, "svg")]
  assert [chart.name for chart in drawn] == ["loss_training", "loss_steps", "loss_time"]
  ticks = [[t for t in chart.svg.split("<text")[2:] if 'x="46"' in t] for chart in drawn]
  assert ticks[0] and ticks[0] == ticks[1] == ticks[2]


@pytest.mark.parametrize(
  ("count", "said"), [(1, "0"), (2, "0 and 1"), (7, "0, 1, 2, 3 and 3 more")]
)
def test_names(count, said):
  assert conclusions.names([str(i) for i in range(count)]) == said
