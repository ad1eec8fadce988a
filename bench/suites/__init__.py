"""For pytest-benchmark: `pytest bench/suites --benchmark-only`."""
