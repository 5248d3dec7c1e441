"""Tasks of lm-eval on an import, against its own model of the same files; windows of a text."""

import json
import math

import jax
import numpy as np
import pytest
import tokenizers
import yaml

import moe_jax
from moe_jax.analysis import harness, scoring
from moe_jax.errors import UserError
from moe_jax.hf import importing
from moe_jax.storage import workdir as workdir_lib
from tests.support.hf_files import plan
from tests.support.scripts import ONE_DEVICE, python, refused
from tests.support.toys import mesh_of

SPECIAL = ["<|endoftext|>", "<s>", "<|im_end|>"]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{ message.role[0] }} {{ message.content }}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}a {% endif %}"""
LETTERS = [chr(97 + i) for i in range(20)] + list("A .!?")
QUESTIONS = [
  {"question": "abc", "choices": ["de", "f", "abcdefgh"], "answer": 1},
  {"question": "a b c", "choices": [" d", "e", "ff"], "answer": 0},
  {"question": "t" * 60, "choices": ["s", "ab", "c"], "answer": 2},  # longer than the model reads
  {"question": "", "choices": ["abc", "<s>b"], "answer": 0},
  {"question": "<s>a<|im_end|>b", "choices": ["ab", "c"], "answer": 1},
]
TEXTS = [{"text": "abcdefg hij" * n} for n in (1, 5, 19)]
TASKS = {
  "choose": {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
  },
  "roll": {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
  },
  "write": {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "x",
    "generation_kwargs": {"until": ["a", "!"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
  },
}


CHAT = {"apply_chat_template": True, "system_instruction": "e", "num_fewshot": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
  """A Qwen3-MoE of transformers with a tokenizer of letters, and three tasks as files.

  A begin token stands before each text, or none does; the end token is not the separator.
  """
  begins = request.param
  pytest.importorskip("lm_eval", reason="the standard tasks: pip install -e '.[eval]'")
  pytest.importorskip("torch", reason="compares with Hugging Face: pip install -e '.[hf]'")
  from tests.support import hf_models

  path = tmp_path_factory.mktemp("harness")
  hf_models.build(
    "qwen3_moe",
    path / "model",
    max_position_embeddings=32,
    eos_token_id=2,
    vocab_size=len(SPECIAL) + len(LETTERS),
  )
  vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  model.decoder = tokenizers.decoders.Fuse()
  model.add_special_tokens(SPECIAL)
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 32,
  }
  if begins:
    settings["bos_token"] = "<s>"
    model.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 1)]
    )
  model.save(str(path / "model/tokenizer.json"))
  (path / "model/tokenizer_config.json").write_text(json.dumps(settings))
  (path / "model/chat_template.jinja").write_text(TEMPLATE)
  (path / "tasks").mkdir()
  for name, task in TASKS.items():
    data = path / f"{name}.jsonl"
    rows = TEXTS if name == "roll" else QUESTIONS
    if name == "write":  # lm-eval needs a token, and asks only a batch's first text for a begin
      rows = [question for question in QUESTIONS if question["question"][:1] not in ("", "<")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = {
      "task": name,
      "dataset_path": "json",
      "test_split": "test",
      "dataset_kwargs": {"data_files": {"test": str(data)}},
    }
    (path / f"tasks/{name}.yaml").write_text(yaml.safe_dump(fixed | task))
  with jax.set_mesh(mesh_of()):
    made = plan(path / "model")
    importing.save_import(made, importing.read_weights(made, mesh_of()), path / "run")
  return path


def evaluated(folder, model, **options):
  import lm_eval
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=str(folder / "tasks"))
  return lm_eval.simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
@pytest.mark.parametrize(
  ("folder", "options"),
  [(True, {}), (True, CHAT), (False, {})],
  indirect=["folder"],
  ids=["begin token", "chat", "no begin token"],
)
def test_the_answers_are_those_of_lm_evals_own_model(options, folder):
  """Each log-likelihood, each rolling one, each text that is written, and the metrics."""
  from lm_eval.models.huggingface import HFLM

  theirs = HFLM(str(folder / "model"), device="cpu", dtype="float32", max_length=32, batch_size=2)
  want = evaluated(folder, theirs, **options)
  got = evaluated(folder, harness.language_model(str(folder / "run"), 0, 2), **options)
  for name in TASKS:
    pairs = zip(got["samples"][name], want["samples"][name], strict=True)
    for ours, other in pairs:
      for one, two in zip(ours["resps"], other["resps"], strict=True):
        if name == "write":
          assert one == two
        elif name == "roll":
          np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
        else:
          np.testing.assert_allclose(one[0][0], two[0][0], rtol=1e-5)
          assert one[0][1] == two[0][1]
    for metric, value in want["results"][name].items():
      if isinstance(value, float):
        assert got["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [False], indirect=True)
def test_eval_runs_tasks_and_measures_a_text(folder, tmp_path):
  (tmp_path / "text").write_text("abcdefg hij" * 9)
  done = python(
    "eval.py",
    f"--workdir={folder / 'run'}",
    "--tasks=choose,write",
    "--limit=2",
    f"--task_folder={folder / 'tasks'}",
    f"--text={tmp_path / 'text'}",
    "--stride=5",
    env=ONE_DEVICE | {"HF_HUB_OFFLINE": "1"},
  )
  assert not done.returncode, done.stderr
  assert "acc_norm" in done.stdout and "of 99 tokens; windows of 32, stride 5" in done.stdout
  results = json.loads((folder / "run" / harness.TASKS).read_text())
  assert results["n-samples"]["choose"]["effective"] == 2
  said = refused("eval.py", f"--workdir={folder / 'run'}", "--tasks=chose")
  assert "lm-eval has no chose" in said


def test_windows_score_every_id_once():
  for count in (0, 1, 7, 8, 9, 30):
    for length, stride in ((8, 8), (8, 3), (8, 1), (1, 1)):
      ids, seen = list(range(1, count + 1)), []
      for window in scoring.windows([0], ids, length, stride):
        assert len(window.ids) <= length + 1 and window.scored < len(window.ids)
        seen += window.ids[len(window.ids) - window.scored :]
        first = window.ids[-window.scored]
        assert first <= length or len(window.ids) - window.scored >= length - stride + 1
      assert seen == ids


@pytest.mark.parametrize(("context", "continuation"), [(3, 2), (9, 2), (1, 8), (5, 20), (12, 17)])
def test_a_continuation_is_scored_whole_after_as_much_context_as_there_is_room_for(
  context, continuation
):
  ids = list(range(context + continuation))
  windows = list(scoring.windows(ids[:context], ids[context:], 8, 8))
  assert [i for w in windows for i in w.ids[len(w.ids) - w.scored :]] == ids[context:]
  first = windows[0].ids
  assert len(first) - windows[0].scored == min(context, max(9 - continuation, 1))
  assert all(w.ids == ids[w.ids[0] : w.ids[-1] + 1] and len(w.ids) <= 9 for w in windows)


@pytest.mark.parametrize("stride", [pytest.param(9, marks=pytest.mark.slow), 4])
def test_perplexity_is_that_of_the_models_logits(whole_run, stride):
  """Every byte from the longest window that its stride gives it, one after another."""
  text = moe_jax.load(whole_run.workdir)
  ids = text.tokenizer.encode("def f(x):\n  return x + 1\n").tolist()
  loss, bits_per_byte = harness.perplexity(text, ids, 9, stride, 4)
  row, total, done = [256, *ids], 0.0, 0
  while done < len(ids):
    end = min(done + (9 if not done else stride), len(ids))
    window = row[max(end - 9, 0) : end + 1]
    log_probs = jax.nn.log_softmax(text.logits(np.array(window[:-1])))
    for back in range(end - done):
      total -= float(log_probs[-1 - back, window[-1 - back]])
    done = end
  assert loss == pytest.approx(total / len(ids), rel=1e-5)
  (none,) = scoring.scores_of_windows(text, [[]], 4, len)
  assert none.log_probs.shape == none.best.shape == (0,) and none.best.all()
  assert bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-6)


def test_mistakes_are_one_line(whole_run, tmp_path):
  with pytest.raises(UserError, match="No such file"):
    harness.perplexity_of_text(str(whole_run.workdir), 0, str(tmp_path / "none"), 0, 4)
  (tmp_path / "text").write_text("abc")
  length = workdir_lib.read_config(whole_run.workdir).data.seq_len
  with pytest.raises(UserError, match=f"--stride={length + 1} is over config.data.seq_len"):
    harness.perplexity_of_text(str(whole_run.workdir), 0, str(tmp_path / "text"), length + 1, 4)
