"""Benchmarks: fastseg and what people use today, side by side, on this machine."""
