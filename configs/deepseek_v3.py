"""DeepSeek-V3

Question   TODO
Command    TODO
Hardware   TODO
Time       TODO
Expect     TODO
"""

from typing import Any

from configs import published
from moe_jax.config import Config, override

RUN = {
  "data.name": "c4/en",
  "data.tokenizer": "tokenizer.json",
  "data.seq_len": 4096,
  "data.batch_size": 15360,
  "loss.balance_scope": "sequence",
  "loss.load_balance": 0.0001,
  "model.moe.dispatch": "grouped",
  "model.moe.exchange": "ragged",
  "model.moe.exchange_factor": 2.0,
  "optimizer.learning_rate": 2.2e-4,
  "optimizer.warmup_steps": 2000,
  "train.steps": 500000,
  "train.log_every": 10,
  "train.eval_every": 1000,
  "train.checkpoint_every": 1000,
  "eval.batches": 8,
  "eval.final_batches": 64,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "v5p_1024": {
    "mesh.fsdp": 8,
    "mesh.expert": 64,
    "train.accumulation": 30,
  },
}


def get_config(where: str = "v5p_1024") -> Config:
  config = override(published.get_config("deepseek_v3"), RUN)
  return published.on_devices(config, LAYOUTS, where)
