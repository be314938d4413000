"""Training data: clips by index, encoded once, batches by seed and step."""
