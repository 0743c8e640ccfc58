"""Other libraries' models and trainers under noise: `peft`, `transformers`; import what you use."""
