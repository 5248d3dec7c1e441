"""OLMoE-1B-7B (2409.02060): 16 layers, d 2048, 64 fine-grained experts of 1024, top-8.

Question   What does pretraining with 64 experts and without drops cost on 16 chips? Sequences of
           4,096 tokens, batches of 1024, rate 4e-4 after 2,500 steps and both loss weights are the
           paper's.
Command    python -m moe_jax.compile --config=configs/olmoe_1b_7b.py:v5p_32 --topology=v5p-32
Hardware   v5p_32: 16 chips (fsdp 16, remat of all but matmuls, 8 microbatches of 8 rows on each),
           40.4 of 95 GiB
Time       to compile: 530 CPU-seconds. Predicted, not measured: 15.9 s a step of 4.2M tokens, MFU
           at most 28.2%, bound by the compiler's estimate: a fifth of it copies gathered experts
           into the order that the grouped matmul takes (with 32 microbatches half, 24.2 s in all)
Expect     6.92B parameters, 1.28B active per token; never trained
"""

from typing import Any

from configs import published
from moe_jax.config import Config, override

RUN = published.PRETRAINING | {
  "data.batch_size": 1024,
  "loss.load_balance": 0.01,
  "loss.router_z": 0.001,
  "model.moe.dispatch": "grouped",
  "optimizer.learning_rate": 4e-4,
  "optimizer.warmup_steps": 2500,
  "train.steps": 1200000,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "v5p_32": {
    "model.remat": "dots",
    "mesh.fsdp": 16,
    "train.accumulation": 8,
  },
}


def get_config(where: str = "v5p_32") -> Config:
  config = override(published.get_config("olmoe_1b_7b"), RUN)
  return published.on_devices(config, LAYOUTS, where)
