"""Public checkpoints to our parameters and back: rules, files, one module per family."""
