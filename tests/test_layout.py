"""The house: which folder may import which, and what only one place may know."""

import ast
import re

from moe_jax.storage import workdir
from tests.support.scripts import python
from tests.support.toys import ROOT

PACKAGE = ROOT / "moe_jax"
TESTS = ROOT / "tests"
_BASE = {"config", "errors"}
_CORE = {*_BASE, "sharding", "storage", "start", "data", "kernels", "moe", "model"}
# What each folder or file may import, besides itself; first what stands alone.
GROUPS = {
  "errors": set(),
  "config": {"errors"},
  "sharding": _BASE,
  "storage": {*_BASE, "sharding"},
  "start": {*_BASE, "storage"},
  "data": {*_BASE, "storage", "start"},
  # The core can be read and taken alone: no decoder, and below the layer no experts' router.
  "kernels": {*_BASE, "sharding"},
  "moe": {*_BASE, "sharding", "kernels"},
  "model": {*_BASE, "sharding", "kernels", "moe"},
  # The everyday loss does not depend on the microscope.
  "training": _CORE,
  # load() pulls no optimizer and no TensorBoard.
  "inference": _CORE,
  "analysis": _CORE | {"inference", "training"},
  # They run anywhere: a plan starts no trainer, and a report needs no jax.
  "report": {*_BASE, "storage", "start"},
  "sweep": {*_BASE, "storage", "start", "moe", "model", "report"},
  "compile": _CORE | {"inference", "training"},
  # A leaf: nothing imports it.
  "hf": _CORE | {"inference"},
}


def imports(path):
  """Modules of the package that a file imports, by their first name."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == "moe_jax":
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_jax."):
      found.add(node.module.split(".")[1])
    elif isinstance(node, ast.Import):
      found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("moe_jax.")}
  return found


def modules():
  for path in sorted(PACKAGE.rglob("*.py")):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name != "__init__":
      yield name, path


def test_folders_import_only_what_they_may():
  for name, path in modules():
    wrong = imports(path) - GROUPS[name] - {name}
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_no_file_without_a_room():
  assert {p.name for p in PACKAGE.glob("*.py")} == {"__init__.py", "errors.py", "sharding.py"}


def test_the_package_knows_no_benchmark():
  for _, path in modules():
    assert not re.search(r"^\s*(?:import|from) benchmarks\b", path.read_text(), re.M), path


def test_configs_and_reports_need_no_model():
  for path in [*(PACKAGE / "config").glob("*.py"), *(PACKAGE / "report").glob("*.py")]:
    assert not re.search(r"^\s*(?:import|from) (jax|flax)\b", path.read_text(), re.M), path


COLLECTIVES = {
  "all_gather", "all_gather_invariant", "all_to_all", "axis_index", "axis_size",
  "pmax", "pmean", "pmin", "ppermute", "pshuffle", "psum", "psum_scatter", "ragged_all_to_all",
}  # fmt: skip


def collectives(path):
  """Names of collectives that a file uses: lax.psum, from jax.lax import psum, parallel.psum."""
  used = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
      used |= {alias.name for alias in node.names}
    elif isinstance(node, ast.Attribute):
      used.add(node.attr)
  return used & COLLECTIVES


def test_four_files_name_collectives():
  seen = {path.name: names for _, path in modules() if (names := collectives(path))}
  assert seen.pop("exchange.py") >= {
    "psum",
    "all_gather",
    "all_to_all",
    "psum_scatter",
    "axis_index",
    "ragged_all_to_all",
  }
  assert seen == {
    "context.py": {"all_gather", "axis_index"},
    "gathered.py": {"all_gather", "psum_scatter"},
    "cross_entropy.py": {"axis_index", "pmax", "psum"},  # over the parts of the vocabulary
  }


def test_only_kernels_know_the_platform():
  for name, path in modules():
    asks = re.search(r"default_backend|\.platform\b", path.read_text())
    assert name in ("kernels", "start") or not asks, path


def test_one_module_names_the_files_of_a_run():
  """Text for people may name them; a literal that is nothing but the name builds a path."""
  names = {v for k, v in vars(workdir).items() if k.isupper() and isinstance(v, str)}
  assert {"config.json", "metrics.jsonl", "checkpoints", "kernels.json"} <= names
  # Of a message; and the files of Hugging Face, which have names of their own.
  allowed = {"config/run.py": {"config.json"}, "hf/files.py": {"config.json"}}
  for _, path in modules():
    tree = ast.parse(path.read_text())
    found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} & names
    name = str(path.relative_to(PACKAGE))
    assert name == "storage/workdir.py" or found <= allowed.get(name, set()), (path, found)


def test_the_readme_maps_the_folders():
  section = (ROOT / "README.md").read_text().split("\n## The code")[1]
  cells = re.findall(r"^\| (`[^|]+`) \|", section, re.M)
  mapped = sorted(n.removeprefix("../") for cell in cells for n in re.findall(r"`([^`]+)`", cell))
  names = (p.name + "/" * p.is_dir() for p in PACKAGE.iterdir() if p.name[0] not in "_.")
  real = {name for name in names if name.endswith(("/", ".py"))}
  assert mapped == sorted(real | {"benchmarks/"})


def test_files_stay_readable():
  """A file past 400 lines is two things. Data and config files have their own folders."""
  for path in [path for _, path in modules()] + sorted(TESTS.rglob("*.py")):
    assert len(path.read_text().splitlines()) <= 400, path


def test_folders_of_tests_are_folders_of_code():
  """So that the tests of a module are found by its name."""
  known = {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {"benchmarks", "launch"}
  folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("*/test_*.py")}
  assert len(folders) > 8 and not folders - known


def test_no_test_file_imports_another():
  """What several share stands in tests/support."""
  for path in TESTS.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      parts = {part for name in names for part in name.split(".")}
      assert not {part for part in parts if part.startswith("test_")}, (path, names)


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
  """As a clone's folder, for who imports moe_jax beside it."""
  (tmp_path / "moe_jax").mkdir()
  done = python("-c", "import moe_jax; moe_jax.load", cwd=tmp_path)
  assert not done.returncode, done.stderr
