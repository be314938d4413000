"""What a model is trained for: which roles move at a step, and the named terms of each."""
