"""Other libraries under noise: `peft`, `transformers`, `distributed`; import what you use."""
