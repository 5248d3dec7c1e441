"""The sentence at the top of each section, against runs whose answer is known by hand."""

import math

import pytest

from moe_jax.report import conclusions, table
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
  assert conclusions.results_verdict(study(CLEAR)) == (
    "Lowest loss: a, 1.2000 ± 0.2000 nats per token (3 seeds). "
    "Clearly higher: b by 0.5000 ± 0.0058."
  )


def test_a_tie():
  said = conclusions.results_verdict(study(TIE))
  assert said.endswith("Not clearly higher: b by 0.1000 ± 0.2309.")


def test_one_seed():
  said = conclusions.results_verdict(study({"a": (1.0,), "b": (1.5,)}))
  assert "1.0000 nats per token (one seed)" in said and "±" not in said
  assert "Higher, uncertain: b by 0.5000." in said
  assert said.endswith("no uncertainty is known.")


def test_two_seeds_are_few():
  said = conclusions.results_verdict(study({"a": (1.0, 1.2), "b": (1.5, 1.71)}))
  assert "Clearly higher: b" in said and said.endswith(
    "the standard error is itself a rough guess."
  )


def test_three_arms_and_a_target():
  third = CLEAR | {"c": (1.1, 1.1, 1.45)}  # c - a: 0.1, -0.1, 0.05
  said = conclusions.results_verdict(study(third, target="b"))
  assert "Not clearly higher: c by" in said and "Clearly higher: b by" in said
  assert "Against b, clearly lower: a and c." in said  # c - b: -0.4, -0.61, -0.44


def test_nothing_finished_and_one_arm():
  assert conclusions.results_verdict(Study(title="t", arms=[ArmRuns(name="a", runs=[])])) == (
    conclusions.NOTHING
  )
  said = conclusions.results_verdict(study({"a": (1.0, 1.2)}))
  assert said.endswith("There is no other arm to compare it with.")


def test_a_divergence_is_said():
  said = conclusions.results_verdict(study({"a": (1.0, 1.1), "b": (float("nan"), 1.0)}))
  assert said.startswith("Lowest loss: a,") and "loss of b is not a finite number" in said


def test_seeds_that_no_two_arms_share():
  found = study(CLEAR)
  for run in found.arms[1].runs:
    run.seed += 10
  assert "no uncertainty is known" in conclusions.results_verdict(found)


def test_steps_to_the_target():
  found = study(CLEAR, target="b")  # ends at 1.7; a is there where its curve falls by 1 in 5 steps
  said = conclusions.curves(found, table.compare_arms(found))
  # Seeds of a are at 1.7 at steps 6.5, 7.5 and 8.5.
  assert "1.7000 nats per token, with which b ends: a, 8 ± 1 steps (3 seeds)" in said
  assert "1.33 times as fast as b" in said
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
  assert "Best balanced" in first and "a, 0.20 ± 0.10" in first and "b by 1.00 ± 0.01" in first
  assert second == "Most dropped: b, 10.0 ± 0.0% (3 seeds)."
  assert "a and b, 1.0 ± 0.0 (3 seeds)" in third  # a tie has no winner
  metrics["drop_fraction_Z"] = {"a": (0, 0, 0), "b": (0, 0, 0)}
  assert "No arm drops anything." in conclusions.balance(study(CLEAR, **metrics))


def test_capacity_domains_and_causality():
  found = study({"a": (1.0, 1.0), "b": (1.0, 1.0)})
  for arm, cost, gap in zip(found.arms, (0.1, 0.3), (0.0, 0.05), strict=True):
    for run in arm.runs:
      points = [
        {"capacity_factor": 1, "loss": 1 + cost},
        {"capacity_factor": math.inf, "loss": 1.0},
      ]
      run.eval = {"capacity": points, "causal": {"gap": gap}}
      run.eval["domains"] = {"code": {"bits_per_byte": cost}, "prose": {"bits_per_byte": -cost}}
      run.routing = {"domain_separation_Z": [cost]}
  assert "factor of 1, against no limit, costs least: a, 0.1000" in conclusions.capacity_verdict(
    found
  )
  said = conclusions.domains(found)
  assert "in code: a." in said and "in prose: b." in said
  assert "routers of b read later tokens" in said and "gap: b, 0.0500" in said
  said = conclusions.specialisation(found)
  assert "differ most between domains, by their separation: b, 0.300" in said
  assert "Clearly lower: a by 0.200" in said


def test_arms_without_a_usable_run_are_named_where_they_could_have_a_number():
  vio = {"a": (0.1, 0.2, 0.3), "b": (1.1, 1.21, 1.29)}
  found = study(CLEAR, target="b", max_vio_Z=vio)
  for _, run in found.runs:
    points = [{"capacity_factor": factor, "loss": 1.0} for factor in (1, math.inf)]
    run.eval = {"capacity": points, "causal": {"gap": 0.0}, "loss": run.validation[-1]["loss"]}
    run.routing = {"domain_separation_Z": [0.1]}
  lost = Run(name="c", seed=0, status="damaged")
  never = ArmRuns(name="d", runs=[], overrides={"model.moe.num_experts": 0})
  found.arms += [ArmRuns(name="c", runs=[lost]), never]
  compared = table.compare_arms(found)
  for said in (
    conclusions.results_verdict(found),
    conclusions.curves(found, compared),
    conclusions.domains(found),
  ):
    assert said.count("c and d are missing here, without a usable run") == 1, said
    assert "Not every finished run" not in said
  for conclude in (conclusions.balance, conclusions.capacity_verdict, conclusions.specialisation):
    assert conclude(found).count(" missing here") == conclude(found).count("c is missing here") == 1


@pytest.mark.parametrize(
  ("count", "said"), [(1, "0"), (2, "0 and 1"), (7, "0, 1, 2, 3 and 3 more")]
)
def test_names(count, said):
  assert conclusions.names([str(i) for i in range(count)]) == said
