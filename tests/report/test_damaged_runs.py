"""Runs whose files are damaged, or lead elsewhere: each is named and left out, the others stand."""

import json
import os
import sys

import pytest

from moe_jax.errors import DamagedError
from moe_jax.report import __main__ as command
from moe_jax.report import page, runs
from moe_jax.start import command_line
from tests.support import report_runs
from tests.support.report_runs import FINISHED, row, sweep, write_report

DEEP = b"[" * 100_000 + b"]" * 100_000
HUGE = b"1" + b"0" * 400


def metrics(**changes):
  """A line of metrics as train.py writes it, but for the changes."""
  line = {"step": 1, "train/loss": 9.0, "train/load_ZE": [[0.25] * 4] * 2}
  return json.dumps({name: v for name, v in (line | changes).items() if v != "missing"}).encode()


def after(line):
  return metrics() + b"\n" + line + b"\n"


def loads(value):
  return after(metrics(step=2, **{"train/load_ZE": value}))


def text_of(**changes):
  """A routing.json of one layer, one token and two experts, but for the changes."""
  layer = {"experts": [[1]], "gates": [[0.5]], "kept": [[True]]}
  text = {"tokens": ["a"], "domain": [""], "layers": [layer | changes]}
  return json.dumps({"layers": [0], "top_tokens_ZE": [[[], []]], "text": text}).encode()


# (file, its bytes, what the report says of it)
DAMAGE = [
  ("config.json", b"\x80\xff\x00", "it is not UTF-8 text"),
  ("config.json", b"", "Expecting value"),
  ("config.json", b"[]", "it holds a list, not an object"),
  ("config.json", DEEP, "config.json is damaged"),
  ("config.json", b'{"a":' * 2000 + b"1" + b"}" * 2000, "maximum recursion depth exceeded"),
  ("config.json", b'{"model": 3}', "config.json is damaged"),
  ("config.json", b'{"train": {"steps": "9"}}', "train.steps is '9', not an integer from 0 up"),
  ("config.json", b'{"data": {"seq_len": %s}}' % HUGE, "data.seq_len is 1000"),
  ("config.json", b'{"format": 99}', "of format 99, made by a newer moe_jax"),
  ("metrics.jsonl", b"\x89PNG\r", "line 1 is no JSON object"),
  ("metrics.jsonl", after(b'{"step": 2, "tr') + metrics(), "line 2 is no JSON object"),
  ("metrics.jsonl", after(b"[1, 2]"), "line 2 is no JSON object"),
  ("metrics.jsonl", after(DEEP), "line 2 is no JSON object"),
  ("metrics.jsonl", after(b"\xff\xfe"), "line 2 is no JSON object"),
  ("metrics.jsonl", after(metrics(step=1.5)), "line 2: step is 1.5, not an integer from 0 up"),
  ("metrics.jsonl", after(metrics(step=-1)), "line 2: step is -1, not"),
  ("metrics.jsonl", after(metrics(step=float("nan"))), "line 2: step is nan, not"),
  ("metrics.jsonl", after(metrics(step="missing")), "line 2: it has no 'step'"),
  ("metrics.jsonl", after(metrics(**{"train/loss": "2.5"})), "loss is '2.5', not a number"),
  ("metrics.jsonl", after(metrics(**{"train/loss": 1e300})), "loss is 1e+300, not a number"),
  ("metrics.jsonl", after(b'{"step": 2, "train/loss": %s}' % HUGE), "loss is 1000"),
  ("metrics.jsonl", loads([[0.5, 0.5], [1.0]]), "load_ZE[0] has 2 items, not 4"),
  ("metrics.jsonl", loads([[0.5, 0.5]] * 2), "load_ZE[0] has 2 items, not 4"),
  ("metrics.jsonl", loads([["a"] * 4] * 2), "load_ZE[0][0] is 'a', not a number"),
  ("metrics.jsonl", loads([0.25] * 2), "load_ZE[0] is 0.25, not a list"),
  ("metrics.jsonl", loads([[1e300] * 4] * 2), "load_ZE[0][0] is 1e+300, not a number"),
  ("metrics.jsonl", loads([]), "load_ZE has 0 items"),
  ("alarms.jsonl", b'{"step": 1, "layer": [1]}\n', "line 1: layer is [1], not a number"),
  ("alarms.jsonl", b'{"step": 1, "message": 5}\n', "line 1: message is 5, not a text"),
  ("eval.json", b'{"loss": 1.0, "st', "eval.json is damaged"),
  ("eval.json", b'{"loss": "1.0"}', "loss is '1.0', not a number"),
  ("eval.json", b'{"layers": [1, 2, 3]}', "layers has 3 items, not 2"),
  ("eval.json", b'{"layers": []}', "layers has 0 items, not 2"),
  ("eval.json", b'{"capacity": [{"capacity_factor": 1}]}', "it has no 'loss'"),
  ("eval.json", b'{"domains": {"code": 1.5}}', "code is 1.5, not an object"),
  ("routing.json", b'{"a": ' + DEEP + b"}", "routing.json is damaged"),
  ("routing.json", b'{"layers": [0, 1]}', "it has no 'top_tokens_ZE'"),
  ("routing.json", text_of(experts=[[1 << 40]]), "a token went to an expert that is none of 2"),
  ("routing.json", text_of(experts=[[0.5]]), "experts[0][0] is 0.5, not an integer"),
  ("routing.json", text_of(kept=[]), "kept has 0 items"),
  ("routing.json", b'{"layers": [], "top_tokens_ZE": []}', "top_tokens_ZE has 0 items"),
]  # fmt: skip
# What is wrong with the entry of a run in sweep.json, and what the report says of it.
ENTRIES = [
  ({"workdir": None}, "workdir is None, not a text"),
  ({"workdir": "missing"}, "it has no 'workdir'"),
  ({"workdir": "../../elsewhere"}, "its workdir '../../elsewhere' is not in this folder"),
  ({"workdir": "/etc"}, "its workdir '/etc' is not in this folder"),
  ({"workdir": "a\x00b"}, "embedded null byte"),
  ({"seed": -1}, "seed is -1, not an integer from 0 up"),
  ({"status": "fine"}, "status is 'fine', not one of waiting, running, finished, failed, stopped"),
  ({"error": ["a"]}, "error is ['a'], not a text"),
]


def spoil(out):
  """Adds an arm of damaged runs, of which each has one fault, and entries that are damaged."""
  record = json.loads((out / "sweep.json").read_text())
  entry = record["runs"][0]
  record["arms"].append({"name": "spoilt", "overrides": {}, "notes": []})
  for number, (name, content, _) in enumerate(DAMAGE):
    workdir = report_runs.write_run(out / f"spoilt/seed{number}", "moe", 0, 0)
    if name != "metrics.jsonl":  # all the others have two MoE layers and two experts
      (workdir / "metrics.jsonl").write_bytes(loads([[0.25] * 4] * 2))
      if name == "routing.json":
        (workdir / "metrics.jsonl").unlink()
    (workdir / name).write_bytes(content)
    where = f"spoilt/seed{number}"
    record["runs"].append(entry | {"arm": "spoilt", "seed": number, "workdir": where})
  for changes, _ in ENTRIES:
    wrong = {k: v for k, v in (entry | {"arm": "spoilt"} | changes).items() if v != "missing"}
    record["runs"].append(wrong)
  record["runs"].append("an entry")
  report_runs.write_json(out / "sweep.json", record)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
  """A sweep's report, and the same of a sweep with an arm of damaged runs besides."""
  out = tmp_path_factory.mktemp("damaged")
  clean = write_report(sweep(out))
  spoil(out)
  return clean, write_report(out)


def whys(written):
  """What the report says of each damaged run, in the order of sweep.json."""
  table = written.markdown.split("**Damaged runs, left out**\n\n")[1].split("\n\n")[0]
  return [line.split(" | ")[2].replace("\\", "") for line in table.splitlines()[2:]]


def test_the_other_runs_are_reported_as_before(reports):
  clean, spoilt = reports
  for arm in ("dense", "moe", "bad"):
    assert row(spoilt.markdown, arm) == row(clean.markdown, arm)


def test_an_arm_of_damaged_runs_has_no_number(reports):
  count = len(DAMAGE) + len(ENTRIES)
  assert row(reports[1].markdown, "spoilt")[1:4] == [f"0 of {count}", "-", "-"]
  assert f"{count + 1} of {count + 7} runs are damaged and left out" in reports[1].markdown


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_damaged_run_is_named_with_the_line_that_says_why(number, reports):
  name, _, words = DAMAGE[number]
  said = whys(reports[1])[number]
  assert f"seed{number}" in said and name in said and words in said


@pytest.mark.parametrize("number", range(len(ENTRIES)))
def test_a_damaged_entry_is_named_with_the_line_that_says_why(number, reports):
  said = whys(reports[1])[len(DAMAGE) + number]
  where = f"sweep.json is damaged (runs[{len(FINISHED) + len(DAMAGE) + number}]: "
  assert where in said and ENTRIES[number][1] in said


def test_an_entry_of_no_arm_is_named_too(reports):
  assert "it is 'an entry', not an object" in whys(reports[1])[-1]
  assert row(reports[1].markdown, "(of no arm)")[1] == "0 of 1"


def test_damaged_runs_are_named_on_stderr(tmp_path, capsys, monkeypatch):
  out = sweep(tmp_path)
  (out / "moe/seed1/eval.json").write_text("[]")
  monkeypatch.setattr("sys.argv", ["report", str(out)])
  assert command.main() == 0
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and said.startswith("moe/seed1 is left out: ")
  assert (
    "eval.json is damaged (it holds a list, not an object); delete it and run eval.py again" in said
  )


def test_a_diverged_run_is_no_damage(tmp_path):
  out = sweep(tmp_path)
  path = out / "moe/seed0/metrics.jsonl"
  path.write_text(path.read_text().replace('"validation/loss": 1.6', '"validation/loss": NaN'))
  text = write_report(out).markdown
  assert "The loss of moe is not a finite number." in text and "amaged" not in text


def test_runs_of_an_arm_have_the_same_layers(tmp_path):
  out = sweep(tmp_path)
  report_runs.write_run(out / "moe/seed1", "moe", 1, experts=8)
  first, second = runs.read_sweep(out).arms[1].runs
  assert first.status == "finished" and second.status == "damaged"
  assert second.error == "moe/seed1 has other layers or experts than the other runs of its arm"


def test_a_log_may_hold_anything(tmp_path):
  out = sweep(tmp_path, FINISHED | {("moe", 0): "stopped"})
  (out / "moe/seed0/log.txt").write_bytes(b"\xff" * 200_000 + b"\nthe \x1b[31mend\xff\n")
  assert "the \ufffd[31mend\ufffd" in write_report(out).markdown


def secret(folder):
  """A folder outside of the runs, whose files have their names."""
  report_runs.write_run(folder, "moe", 0)
  report_runs.write_eval(folder, 1.25, split="SECRET")
  (folder / "log.txt").write_text("SECRET\n")
  path = folder / "config.json"
  path.write_text(path.read_text().replace('"arm": "moe"', '"arm": "SECRET"'))
  return folder


def contents(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_shows_nothing_from_outside_of_its_folder(tmp_path):
  """Each run leads there in another way: by links of files and folders, and by its entry."""
  hidden = secret(tmp_path / "hidden")
  seeds = range(8)
  out = tmp_path / "out"
  for seed in seeds:
    report_runs.write_run(out / f"moe/seed{seed}", "moe", 0)
    report_runs.write_eval(out / f"moe/seed{seed}", 1.0)
  for seed, name in enumerate(("config.json", "eval.json", "metrics.jsonl", "log.txt")):
    link = out / f"moe/seed{seed}" / name
    link.unlink(missing_ok=True)
    link.symlink_to(hidden / name)
  (out / "moe/seed4").rename(tmp_path / "moved")
  (out / "moe/seed4").symlink_to(hidden)
  report_runs.write_sweep(out, {("moe", seed): "stopped" for seed in seeds}, target_arm="")
  record = json.loads((out / "sweep.json").read_text())
  for entry, workdir in zip(
    record["runs"][5:], ("../hidden", str(hidden), "a/../../hidden"), strict=True
  ):
    entry["workdir"] = workdir
  report_runs.write_json(out / "sweep.json", record)
  written = write_report(out)
  assert "SECRET" not in written.markdown + written.html
  assert "SECRET" in runs.reading.log_tail(hidden, hidden)
  said = whys(written)
  assert ["a link that leads out" in why for why in said] == [True] * 3 + [False] * 4
  assert ["is not in this folder" in why for why in said] == [False] * 3 + [True] * 4


@pytest.mark.parametrize(
  ("make", "why"), [(os.mkfifo, "it is no file"), (os.mkdir, "Is a directory")]
)
def test_what_is_no_file_is_not_read(make, why, tmp_path):
  """A pipe would block its reader."""
  out = sweep(tmp_path)
  make(out / "moe/seed0/eval.json")
  make(out / "moe/seed1/log.txt")
  error = runs.read_sweep(out).arms[1].runs[0].error
  assert "seed0/eval.json is damaged (it is no file" in error


@pytest.mark.parametrize("name", ["eval.json", "metrics.jsonl"])
def test_a_file_larger_than_a_run_writes_is_not_read(name, tmp_path):
  out = sweep(tmp_path)
  with (out / "moe/seed0" / name).open("ab") as file:
    file.truncate(1 << 40)  # takes no room on the disk
  first, second = runs.read_sweep(out).arms[1].runs
  assert first.status == "damaged" and f"seed0/{name} is damaged (it is no file of" in first.error
  assert second.status == "finished"


def test_what_is_said_of_a_damaged_run_is_one_line_that_no_terminal_obeys(tmp_path):
  out = sweep(tmp_path)
  (out / "moe/seed0").rename(out / "moe/a\x1b[2J\nb")
  (out / "moe/a\x1b[2J\nb/metrics.jsonl").write_text('{"step": 1, "train/\\u001b[2J\\n": "a"}\n')
  record = json.loads((out / "sweep.json").read_text())
  record["runs"][2]["workdir"] = "moe/a\x1b[2J\nb"
  report_runs.write_json(out / "sweep.json", record)
  (note,) = page.compare(out).notes
  assert note.isprintable() and "train/[2J is 'a', not a number" in note


def test_named_workdirs_are_left_out_where_they_are_damaged(tmp_path):
  names = ("a-s0", "a-s1", "b", "c")
  folders = [report_runs.write_run(tmp_path / name, "moe", int("1" in name)) for name in names]
  (folders[2] / "config.json").write_bytes(b"\xff")
  (folders[3] / "config.json").write_bytes(b"\xff")
  found = {arm.name: [run.status for run in arm.runs] for arm in runs.read_workdirs(folders).arms}
  assert found == {"a": ["finished", "finished"], "b": ["damaged"], "c": ["damaged"]}


# A whole sweep.json of which nothing can be shown.
RECORDS = {
  b"": "Expecting value", b"\xff": "not UTF-8", b"[]": "holds a list", DEEP: "is damaged",
  b"{}": "it has no 'arms'", b'{"method": "grid", "parameters": {}}': "it has no 'arms'",
  b'{"arms": {}, "runs": []}': "arms is {}, not a list",
  b'{"arms": [{}], "runs": []}': "it has no 'name'",
  b'{"arms": [], "runs": [], "question": 3}': "question is 3, not a text",
  b'{"format": 2, "arms": 7}': "is of format 2, made by a newer moe_jax; update this one",
}  # fmt: skip


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
  return write_report(sweep(tmp_path_factory.mktemp("reported"))).folder


@pytest.mark.parametrize("content", RECORDS, ids=range(len(RECORDS)))
def test_a_damaged_sweep_is_one_line_and_changes_nothing(content, reported, capsys, monkeypatch):
  out = reported
  (out / "sweep.json").write_bytes(content)
  before = contents(out)
  with pytest.raises(DamagedError):
    page.compare(out)
  monkeypatch.setattr("sys.argv", ["report", str(out)])
  monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
  with pytest.raises(SystemExit) as ended:
    command_line.one_line_errors(command.main)
  said = capsys.readouterr().err
  assert ended.value.code == 4 and said.count("\n") == 1 and RECORDS[content] in said
  assert contents(out) == before
