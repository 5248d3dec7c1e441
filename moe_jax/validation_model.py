"""What the fields of a decoder must satisfy together; imports no jax."""

from moe_jax.config import Model, UserError, flatten


def check_model(model: Model) -> None:
  """Raises a UserError for fields that disagree."""
  if model.num_heads % model.num_kv_heads:
    raise UserError(
      f"config.model.num_heads={model.num_heads} is not divisible by config.model.num_kv_heads="
      f"{model.num_kv_heads}: each key/value head serves the same number of query heads"
    )
  if model.head_dim % 2 and not model.latent.kv_dim:
    raise UserError(f"config.model.head_dim={model.head_dim} must be even: RoPE rotates pairs")
  if model.latent.kv_dim:
    _check_latent(model)
  width = model.rotated_width
  if width % 2 or not width:
    raise UserError(
      f"config.model.rotary_fraction={model.rotary_fraction} of config.model.head_dim="
      f"{model.head_dim} is {width} dimensions; RoPE rotates pairs, so make it even"
    )
  if model.global_every and not model.window and not model.delta.value_heads:
    raise UserError(
      f"config.model.global_every={model.global_every} with config.model.window=0: all layers "
      "attend to everything; set a window, or global_every=0"
    )
  if model.delta.value_heads:
    _check_delta(model)
  scaling = model.rope_scaling
  if scaling.beta_slow > scaling.beta_fast:  # equal ones are a step; Kimi-K2 has them
    raise UserError(
      f"config.model.rope_scaling.beta_slow={scaling.beta_slow} is over beta_fast="
      f"{scaling.beta_fast}: the ramp lies between them"
    )
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    raise UserError(
      f"config.model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
      f"high_freq_factor={scaling.high_freq_factor}: the ramp lies between them"
    )


def _check_delta(model: Model) -> None:
  delta = model.delta
  if delta.value_heads % delta.key_heads:
    raise UserError(
      f"config.model.delta.value_heads={delta.value_heads} is not divisible by config.model.delta."
      f"key_heads={delta.key_heads}: each head of keys serves the same number of heads of values"
    )
  if model.window:
    raise UserError(
      f"config.model.window={model.window} with config.model.delta.value_heads="
      f"{delta.value_heads}: a layer has a window or the delta rule; set window=0"
    )


def _check_latent(model: Model) -> None:
  latent, plain = model.latent, Model()
  for name in ("qk_norm", "qkv_bias", "out_bias", "rotary_fraction", "attention_gate"):
    if getattr(model, name) != getattr(plain, name):
      raise UserError(
        f"config.model.{name}={flatten(model)[name]} with config.model.latent.kv_dim="
        f"{latent.kv_dim}: latent attention has none; set it to {flatten(plain)[name]}"
      )
  if model.num_kv_heads != model.num_heads:
    raise UserError(
      f"config.model.num_kv_heads={model.num_kv_heads} with config.model.latent.kv_dim="
      f"{latent.kv_dim}: each head has keys and values of its own; set it to {model.num_heads}"
    )
  if latent.rotary_dim % 2:
    raise UserError(
      f"config.model.latent.rotary_dim={latent.rotary_dim} must be even: RoPE rotates pairs"
    )
  if latent.rotary_dim >= model.head_dim or latent.value_dim > model.head_dim:
    raise UserError(
      f"config.model.head_dim={model.head_dim} must be above config.model.latent.rotary_dim="
      f"{latent.rotary_dim}, and at least value_dim={latent.value_dim}"
    )
