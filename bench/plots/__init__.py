"""Pictures of the rows: `python -m bench.plots` draws them."""
