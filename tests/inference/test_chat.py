"""Chat templates: as transformers renders them, and answers that end where the template says."""

import json
import time

import jax
import pytest
import tokenizers

import moe_jax
from moe_jax.data import tokenizers as ours
from moe_jax.errors import UserError
from moe_jax.hf import exporting, families, importing
from moe_jax.inference import chat
from tests.support.hf_files import loaded, plan, toy
from tests.support.scripts import call, refused
from tests.support.toys import mesh_of

TEMPLATE = """{{ bos_token }}{% if tools is none and documents is none %}
{%- for message in messages %}
    {%- if message['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}
<|im_start|>{{ message['role'] + '\\n' }}{% generation %}{{ message['content'] | trim }}
{%- endgeneration %}<|im_end|>
{% endfor %}{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MESSAGES = [
  {"role": "system", "content": "e"},
  {"role": "user", "content": " abc "},
  {"role": "assistant", "content": "b<|im_end|>"},
  {"role": "user", "content": "d"},
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The files of a tokenizer with one id for each letter, and a template beside it."""
  path = tmp_path_factory.mktemp("chat")
  letters = [chr(97 + i) for i in range(20)]
  vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  model.add_special_tokens(SPECIAL)
  model.save(str(path / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|endoftext|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
    "unk_token": "a",
  }
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  (path / "chat_template.jinja").write_text(TEMPLATE)
  return path


def test_the_text_and_the_ids_are_those_of_transformers(folder):
  transformers = pytest.importorskip(
    "transformers", reason="compares with Hugging Face: pip install -e '.[hf]'"
  )
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  template = chat.Template(folder)
  text = template.render(MESSAGES)
  assert template.render(MESSAGES[:-1], begin_answer=False) == theirs.apply_chat_template(
    MESSAGES[:-1], tokenize=False
  )
  assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
  assert ours.HuggingFace(str(folder / "tokenizer.json")).encode_special(text) == theirs.encode(
    text, add_special_tokens=False
  )


def test_special_tokens_of_the_template_are_ids_and_a_text_has_none(folder):
  tokenizer = ours.HuggingFace(str(folder / "tokenizer.json"))
  ids = tokenizer.encode_special(chat.Template(folder).render(MESSAGES[:1]))
  assert ids[0] == 0 and ids.count(1) == 2 and ids.count(2) == 1
  assert not {1, 2} & set(tokenizer.encode("<|im_end|>").tolist())


def test_what_has_no_template_or_refuses_is_one_line(folder, tmp_path):
  with pytest.raises(UserError, match=r"no chat_template\.jinja, and no chat_template"):
    chat.Template(tmp_path)
  with pytest.raises(UserError, match="refuses the messages: no robots"):
    chat.Template(folder).render([{"role": "robot", "content": ""}])


FOREIGN = {
  "{{ ''.__class__.__mro__ }}": "unsafe",
  "{{ 1 / 0 }}": "ZeroDivisionError division by zero",
  "{% for %}": "Expected an expression",
  "{{ messages[0].content.missing.more }}": "has no attribute 'missing'",
  "{{ 'a' * 2 ** 33 }}": "MemoryError",
  "{{ 'a' * 2 ** 25 }}": "does not end in 1 s, or needs too much memory",
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "does not end",
}


@pytest.mark.parametrize("program", FOREIGN)
def test_a_template_ends_and_whatever_it_does_is_one_line(program, tmp_path, monkeypatch):
  monkeypatch.setattr(chat, "_SECONDS", 1.0)
  (tmp_path / chat.FILE).write_text(program)
  template = chat.Template(tmp_path)
  with pytest.raises(UserError, match=FOREIGN[program]) as error:
    template.render(MESSAGES)
  assert "\n" not in str(error.value)
  template.text = "{{ messages[0].content }}"
  assert template.render(MESSAGES) == "e"  # another process, where one had to end
  template._worker.kill()
  template._worker.wait()
  with pytest.raises(UserError, match="does not end"):
    template.render(MESSAGES)


@pytest.mark.parametrize(
  ("name", "content"),
  [(chat.FILE, b"\xff"), ("tokenizer_config.json", b'{"chat_template": ["a", {"name": "b"}]}')],
)
def test_a_template_that_is_no_text_is_one_line(name, content, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=f"{name}: this is not UTF-8|has no {chat.FILE}"):
    chat.Template(tmp_path)


def test_a_template_gets_the_functions_that_transformers_gives_it(tmp_path):
  (tmp_path / chat.FILE).write_text(
    "{{ {'b': 'é', 'a': [1]} | tojson(false, 1, sort_keys=true) }}{{ strftime_now(format='%Y') }}"
  )
  text = chat.Template(tmp_path).render(MESSAGES)
  assert text == '{\n "a": [\n  1\n ],\n "b": "é"\n}' + time.strftime("%Y")


@pytest.mark.slow
def test_an_import_answers_and_ends_at_the_files_eos(folder, tmp_path):
  """The end of the generation's settings counts beside the separator of the text."""
  with jax.set_mesh(mesh_of()):
    exporting.export(loaded(toy()), families.FAMILIES["qwen3_moe"], tmp_path / "in")
    for file in folder.iterdir():
      (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    made = plan(tmp_path / "in")
    importing.save_import(made, importing.read_weights(made, mesh_of()), tmp_path / "run")
  run = tmp_path / "run"
  (tmp_path / "turns.json").write_text(json.dumps(MESSAGES[1:3]))
  earlier = ("--chat", "--system=e", f"--messages={tmp_path / 'turns.json'}", "--prompt=d")
  options = (f"--workdir={run}", "--max_new_tokens=9", "--temperature=0")
  done = call("generate.py", *options, *earlier)
  assert not done.returncode, done.stderr
  model = moe_jax.load(run)
  ids = model.tokenizer.encode_special(chat.Template(run / "hf").render(MESSAGES))
  (answer,) = model.generate([ids], max_new_tokens=9, temperature=0)
  assert done.stdout == answer.text + "\n"
  assert model.before == [] and model._ids("").tolist() == [0]  # its files put nothing there
  assert "--system and --messages go with --chat" in refused("generate.py", *options, earlier[1])
  for text in ('[{"role": "user"}]', '[["role", "content"]]', '{"role": "user", "content": "a"}'):
    (tmp_path / "turns.json").write_text(text)
    assert "not a JSON list of" in refused("generate.py", *options, *earlier)
  ends = json.dumps({"eos_token_id": list(range(2, 24))})  # nearly every id
  (tmp_path / "run/hf/generation_config.json").write_text(ends)
  (row,) = moe_jax.load(tmp_path / "run").generate("abc", max_new_tokens=64, temperature=0)
  assert row.finished and len(row.tokens) < 64
