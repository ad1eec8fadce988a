"""The way any model gets a fast path; nothing here knows a model."""
