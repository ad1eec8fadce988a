"""How any model gets a fast path; knows no model."""
