"""The engine: recipes as data, one loop, checkpoints, logs."""
