"""Measuring launch configurations on the present GPU: `fastseg tune`."""
