from moe_jax.config import Config, Data, Eval, Model, MoE, Train


def get_config() -> Config:
  return Config(model=Model(moe=MoE(num_experts=8)))
