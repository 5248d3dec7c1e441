"""gpt-oss-20b

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
  "data.seq_len": 8192,
  "data.batch_size": 16,
  "loss.load_balance": 0.0,
  "model.moe.capacity_factor": 1.25,
  "model.attention": "blocks",
  "optimizer.learning_rate": 4e-4,
  "optimizer.warmup_steps": 128,
  "optimizer.eps": 1e-05,
  "train.steps": 1200000,
  "train.log_every": 10,
  "train.eval_every": 1000,
  "train.checkpoint_every": 1000,
  "eval.batches": 8,
  "eval.final_batches": 64,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "h200_8": {
    "mesh.fsdp": 8,
  },
}


def get_config(where: str = "h200_8") -> Config:
  config = override(published.get_config("gpt_oss_20b"), RUN)
  return published.on_devices(config, LAYOUTS, where)
