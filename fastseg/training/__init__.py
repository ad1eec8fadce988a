"""Training: what is faster there than the operators of a model's own code."""
