"""The flow of the package: a module imports only what stands before it."""

import ast
import pathlib
import re

from moe_jax import workdir

ROOT = pathlib.Path(__file__).parent.parent
# What each group may import, besides itself; first what stands alone.
GROUPS = {
  "config": set(),
  "validation": {"config"},
  "workdir": {"config", "validation"},
  "command_line": {"config"},
  "data": {"config"},
  "sharding": {"config"},
  "startup": {"config", "data"},
  "kernels": {"config", "sharding"},
  "moe": {"config", "sharding", "kernels"},
  "model": {"config", "validation", "sharding", "kernels", "moe"},
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
  for path in sorted((ROOT / "moe_jax").rglob("*.py")):
    name = path.relative_to(ROOT / "moe_jax").parts[0].removesuffix(".py")
    if name != "__init__":
      yield name, path


def test_imports_point_back():
  for name, path in modules():
    if name in GROUPS:
      wrong = imports(path) - GROUPS[name] - {name}
      assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_reports_need_no_model():
  for path in (ROOT / "moe_jax/report").glob("*.py"):
    # These modules import no jax.
    assert not re.search(r"^\s*(?:import|from) (jax|flax)\b", path.read_text(), re.M), path
    assert imports(path) <= {"report", "config", "workdir"}, path


def test_one_file_names_collectives():
  for _, path in modules():
    if path.name != "exchange.py":
      assert not re.search(r"lax\.(psum|all_to_all|all_gather|ppermute)", path.read_text()), path


def test_one_module_names_the_files_of_a_run():
  """Text for people may name them; a literal that is nothing but the name builds a path."""
  names = {v for k, v in vars(workdir).items() if k.isupper() and isinstance(v, str)}
  assert {"config.json", "metrics.jsonl", "checkpoints", "kernels.json"} <= names
  allowed = {"config.py": {"config.json"}}  # of a message
  for _, path in modules():
    tree = ast.parse(path.read_text())
    found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} & names
    assert path.name == "workdir.py" or found <= allowed.get(path.name, set()), (path, found)


def test_files_stay_readable():
  """A file past some 300 lines is two things. Data and config files have their own folders."""
  for _, path in modules():
    assert len(path.read_text().splitlines()) <= 330, path
