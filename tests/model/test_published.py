"""The parameter counts of published models, of their shapes alone."""

import pytest

from configs import published
from moe_jax.model import cost
from moe_jax.moe import validation

# {model: (total, active, active without the input embedding)}, in billions. Of MoE models from
# transformers' own code and their model cards; of dense ones their published numbers of parameters.
PUBLISHED = {
  "mixtral_8x7b": (46.7028, 12.8799, 12.7489),
  "mixtral_8x22b": (140.6301, 39.1615, 38.9601),
  "olmoe_1b_7b": (6.9192, 1.2820, 1.1790),
  "qwen1_5_moe_a2_7b": (14.3158, 2.6892, 2.3780),
  "qwen2_57b_a14b": (57.4087, 14.2493, 13.7047),
  "qwen3_30b_a3b": (30.5321, 3.3530, 3.0419),
  "qwen3_235b_a22b": (235.0936, 22.1908, 21.5684),
  "qwen3_next_80b_a3b": (79.6744, 3.8749, 3.5638),
  "qwen3_5_35b_a3b": (34.6606, 3.4550, 2.9464),
  "glm_4_5_air": (106.8522, 13.4241, 12.8034),
  "glm_4_5": (352.7978, 33.6323, 32.8563),
  "deepseek_v2_lite": (15.7065, 2.6612, 2.4514),
  "deepseek_v2": (235.7414, 21.3758, 20.8515),
  "deepseek_v3": (671.0264, 37.5523, 36.6256),
  "moonlight_16b_a3b": (15.9601, 2.9148, 2.5792),
  "kimi_k2": (1026.4082, 32.8615, 31.6871),
  "gpt_oss_20b": (20.9148, 4.1874, 3.6083),
  "gpt_oss_120b": (116.8292, 5.7120, 5.1328),
  "minimax_m2": (228.6897, 11.0305, 10.4159),
  "ernie_4_5_21b_a3b": (21.8254, 3.3522, 3.0874),
  "granite_3_1_1b_a400m": (1.3346, 0.4287, 0.3783),
  "granite_3_1_3b_a800m": (3.2988, 0.8829, 0.8074),
  "hunyuan_a13b": (80.3932, 12.7474, 12.2225),
  "llama_2_7b": (6.7384, 6.7384, 6.6073),
  "llama_2_70b": (68.9766, 68.9766, 68.7145),
  "llama_3_1_8b": (8.0303, 8.0303, 7.5049),
  "llama_3_1_70b": (70.5537, 70.5537, 69.5030),
  "mistral_7b": (7.2417, 7.2417, 7.1107),
  "qwen3_8b": (8.1907, 8.1907, 7.5684),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_counts_of_a_published_model(name):
  config = published.get_config(name)
  validation.validate(config)
  counts = cost.count(config)
  lookup = config.model.vocab_size * config.model.dim
  found = [counts.total, counts.active, counts.active - lookup]
  assert [n / 1e9 for n in found] == pytest.approx(PUBLISHED[name], abs=1.01e-4)


def test_every_published_config_is_compared():
  assert published.MODELS.keys() == PUBLISHED.keys()


def test_the_cost_of_a_token_is_beside_them():
  """Of Qwen3-30B: 2 FLOPs for each weight that is multiplied, and attention, three times over."""
  config = published.get_config("qwen3_30b_a3b")
  model = config.model
  vectors = model.num_layers * (2 * model.dim + 2 * model.head_dim) + model.dim
  matmul = cost.count(config).active - model.vocab_size * model.dim - vectors
  attention = 4 * model.num_layers * model.num_heads * model.head_dim * 4097 / 2
  assert cost.count(config).flops_per_token == pytest.approx(3 * (2 * matmul + attention))
