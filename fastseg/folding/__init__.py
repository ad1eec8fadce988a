"""The way any model gets a fast path; no model is imported here."""
