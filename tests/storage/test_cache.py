"""What is built once: by one of two processes, whole or not at all, silently the second time."""

import os
import pathlib
import stat
import subprocess
import sys
import tempfile

import pytest

from moe_jax.config import Data
from moe_jax.data import pipeline
from moe_jax.errors import UserError
from moe_jax.storage import cache
from tests.support.scripts import python
from tests.support.texts import error_of
from tests.support.toys import ROOT

_CHILD = """
import sys
from moe_jax.data import pipeline
from moe_jax.config import Data
rows = pipeline.load_rows(Data(), "train")
print(rows.digest, len(rows))
assert "tensorflow" not in sys.modules
"""


def test_two_processes_tokenize_at_once_without_tensorflow(stdlib, own_cache):
  command = [sys.executable, "-W", "error", "-c", _CHILD]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  children = [
    subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(2)
  ]
  results = [child.communicate(timeout=600) for child in children]
  assert [child.returncode for child in children] == [0, 0], results
  rows = pipeline.load_rows(stdlib, "train")
  assert [out for out, _ in results] == [f"{rows.digest} {len(rows)}\n"] * 2
  # The work was done once, and this line is all that reached the terminal.
  said = "".join(err for _, err in results).splitlines()
  assert [line.split()[0] for line in said] == ["tokenized"]
  assert not list(own_cache.glob("*/*.partial"))


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_a_failed_build_leaves_nothing_and_an_interrupted_one_what_it_had(error, tmp_path):
  def fail(folder):
    (folder / "half").write_text("x")
    raise error("here")

  with pytest.raises(error, match="here"):
    cache.build_once(tmp_path / "made", fail, pathlib.Path.exists)
  left = sorted(path.name for path in tmp_path.iterdir())
  assert left == ["made.lock", "made.partial"][: 1 + (error is KeyboardInterrupt)]
  had = cache.build_once(tmp_path / "made", lambda _: None, lambda path: list(path.iterdir()))
  assert [path.name for path in had] == ["half"] * (error is KeyboardInterrupt)


def test_second_load_is_silent_and_the_same(stdlib, capfd):
  first = pipeline.load_rows(stdlib, "validation")
  capfd.readouterr()
  second = pipeline.load_rows(stdlib, "validation")
  assert capfd.readouterr() == ("", "")
  assert first.digest == second.digest


def test_what_is_made_is_this_users_alone(own_cache):
  pipeline.load_rows(Data(), "test")
  cache.programs()
  for folder in (own_cache, *own_cache.glob("*/")):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
  assert {folder.name for folder in own_cache.iterdir()} == {"tokens", "xla"}


@pytest.mark.parametrize("part", [".", "xla"])
def test_programs_are_not_taken_from_a_folder_that_others_can_write(part, own_cache, capfd):
  assert cache.programs() == own_cache / "xla" and not capfd.readouterr().err
  (own_cache / part).chmod(0o777)
  assert cache.programs() is None
  said = capfd.readouterr().err
  assert f"other users can write to {own_cache / part};" in said and said.count("\n") == 1


_ANOTHER_USER = """
import os, sys
from moe_jax.storage import cache
os.seteuid(65534)
for os.environ["MOE_JAX_CACHE"] in sys.argv[1:]:
  print(cache.programs())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_programs_are_not_taken_from_a_folder_of_another_user():
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    theirs, others = pathlib.Path(folder) / "theirs", pathlib.Path(folder) / "others"
    for path, owner in ((theirs, 65534), (others, 65533)):
      (path / "xla").mkdir(parents=True)
      os.chown(path, owner, owner)
      os.chown(path / "xla", owner, owner)
    done = python("-c", _ANOTHER_USER, theirs, others, env=os.environ, check=True)
    assert done.stdout == f"{theirs / 'xla'}\nNone\n"
    assert f"other users can write to {others};" in done.stderr and done.stderr.count("\n") == 1


_FULL_DISK = """
import resource, sys
from moe_jax.start import command_line
from moe_jax.config import Data
from moe_jax.data import pipeline

limit = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # no file may be larger
data = Data(name="text", path=sys.argv.pop())
command_line.one_line_errors(lambda: print(len(pipeline.load_rows(data, "train"))))
"""


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_half(text, own_cache):
  """The tokens have 310 KB."""
  pathlib.Path(text.path, "a.txt").write_text(
    "".join(f"{i} {i * i % 977}\n" for i in range(15_000))
  )
  command = ["-c", _FULL_DISK, text.path]
  done = python(*command, 200_000, env=os.environ)
  *_, last = done.stderr.splitlines()
  assert done.returncode == 3 and last.startswith(f"error: cannot use the cache {own_cache}/")
  assert "File too large" in last and "--cache_dir" in last and "Traceback" not in done.stderr
  assert not list(own_cache.glob("*/*.partial"))
  again = python(*command, "-1", env=os.environ)
  assert again.returncode == 0 and int(again.stdout) > 100, again.stderr


def test_who_has_no_home_names_a_cache(monkeypatch):
  for name in ("MOE_JAX_CACHE", "XDG_CACHE_HOME", "HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user without an entry
  with pytest.raises(UserError, match=r"there is no home folder; --cache_dir or \$MOE"):
    cache.directory()


def test_cache_that_cannot_be_written(own_cache):
  own_cache.write_text("")
  message = error_of(Data())
  assert f"cannot use the cache {own_cache}" in message and "--cache_dir or $MOE_JAX" in message
