"""What a report writes: whole files, not through links, and the old ones where a disk is full."""

import json
import shutil

import pytest

from moe_jax.errors import StorageError, UserError
from moe_jax.report import page, single
from tests.support.disks import fill, small_disk
from tests.support.real_runs import RUNS, real_runs
from tests.support.report_runs import sweep


def contents(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(out):
  """Lets a report differ from the one before."""
  path = out / "moe/seed0/metrics.jsonl"
  path.write_text(path.read_text().replace("2.5", "2.4"))


def test_a_report_is_not_written_through_links(tmp_path):
  out = sweep(tmp_path / "out")
  page.compare(out)
  written = [path for path in contents(out) if "report" in str(path.relative_to(out))]
  assert len(written) >= 7  # two pages, and at least five pictures
  victims = tmp_path / "victims"
  victims.mkdir()
  for number, path in enumerate(written):
    victim = victims / str(number)
    victim.write_text("mine")
    path.unlink()
    path.symlink_to(victim)
  page.compare(out)
  assert {path.read_text() for path in victims.iterdir()} == {"mine"}
  assert not [path for path in written if path.is_symlink()]


def test_a_folder_of_pictures_that_is_a_link_is_refused(tmp_path):
  out = sweep(tmp_path / "out")
  (tmp_path / "elsewhere").mkdir()
  (out / "report_files").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(UserError, match=r"report_files is a link that leads out of .*; remove it"):
    page.compare(out)
  assert not list((tmp_path / "elsewhere").iterdir()) and not (out / "report.html").exists()


def test_a_full_disk_leaves_the_old_report(tmp_path):
  with small_disk(tmp_path / "disk", "2m") as disk:
    out = sweep(disk / "out")
    page.compare(out)
    before = contents(out)
    change(out)
    before[out / "moe/seed0/metrics.jsonl"] = (out / "moe/seed0/metrics.jsonl").read_bytes()
    filler = fill(disk)
    with pytest.raises(StorageError, match=r"cannot write \S+: No space left on device; .*same"):
      page.compare(out)
    assert contents(out) == before
    filler.unlink()
    page.compare(out)
    after = contents(out)
    assert after.keys() == before.keys() and after[out / "report.md"] != before[out / "report.md"]


@pytest.fixture(scope="module")
def drawn(shared_folder, tmp_path_factory):
  """A real run that has its plots, and the text that came with them; loss.png was a link before.

  Its name looks like a formula to matplotlib, and has letters that the font lacks.
  """
  folder = tmp_path_factory.mktemp("single") / "cost_$x^$_\u2603\u4e2d"
  run = shutil.copytree(real_runs(shared_folder) / RUNS["moe"], folder)
  (run / "loss.png").symlink_to(run.parent / "victim")
  return run, single.summary(str(run), result_of(run))


def result_of(run):
  return json.loads((run / "eval.json").read_text())


def test_plots_are_written_whole_and_not_through_links(drawn):
  run, said = drawn
  plots = [run / name for name in ("loss.png", "load.png", "balance.png")]
  assert said.splitlines()[-1] == "plots              " + ", ".join(map(str, plots))
  assert not (run.parent / "victim").exists() and not list(run.glob("*.new"))
  for path in plots:
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("line", "words"), [
  ('{"step": 1, "train/tokens_per_s": "fast"}', "train/tokens_per_s is 'fast', not a number"),
  ("\x00\x00", "is no JSON object"), ("[" * 100_000, "is no JSON object"),
  ('{"step": 0.5}', "step is 0.5, not an integer from 0 up"),
  ('{"step": 900, "train/max_vio_Z": [1, [2]]}', "max_vio_Z[1] is [2], not a number"),
  (None, "is a link that leads out of"),
])  # fmt: skip
def test_damaged_metrics_cost_a_summary_its_plots_and_nothing_else(line, words, drawn, tmp_path):
  run, _ = drawn
  path = run / "metrics.jsonl"
  text = path.read_text()
  if line is None:
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
  else:
    path.write_text(f"{text}{line}\n")
  before = contents(run)
  try:
    said = single.summary(str(run), result_of(run))
    assert contents(run) == before
  finally:
    path.unlink()
    path.write_text(text)
  assert f"bits per byte      {result_of(run)['bits_per_byte']:.4f} " in said
  last = said.splitlines()[-1]
  assert last.startswith("plots              none: ") and words in last
  assert line is None or f"line {text.count(chr(10)) + 1}" in last


def test_a_full_disk_leaves_the_old_plots(drawn, tmp_path):
  with small_disk(tmp_path / "disk", "2m") as disk:
    run = disk / "run"
    shutil.copytree(drawn[0], run)
    before = contents(run)
    fill(disk)
    with pytest.raises(StorageError, match=r"loss\.png: No space left on device"):
      single.summary(str(run), result_of(run) | {"loss": 2.0})
    assert {path: contents(run)[path] for path in before} == before
