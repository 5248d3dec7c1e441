"""The table of tests.planted fits the package; that tests see its faults, the script shows."""

import shlex

from tests.planted import changed
from tests.support.planted_faults import FAULTS
from tests.support.toys import ROOT


def test_every_fault_can_be_planted():
  """Its text is there, once, and what takes its place compiles and differs."""
  for fault in FAULTS:
    text = (ROOT / "moe_jax" / fault.path).read_text()
    assert changed(fault, text) != text, fault.name


def test_every_fault_names_tests_that_exist():
  for fault in FAULTS:
    files = [word for word in shlex.split(fault.tests) if word.startswith("tests")]
    assert files and all((ROOT / file).exists() for file in files), fault.name


def test_no_two_faults_are_the_same():
  assert len({fault.name for fault in FAULTS}) == len(FAULTS)
