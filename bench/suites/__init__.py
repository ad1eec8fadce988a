"""The benchmarks' cases as pytest-benchmark suites: `pytest bench/suites --benchmark-only`."""
