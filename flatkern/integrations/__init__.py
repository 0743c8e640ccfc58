"""Other libraries under noise: peft, transformers, lightning, distributed; import what you use."""
