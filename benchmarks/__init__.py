"""Scripts behind every number about speed and memory. Run them as modules: `python -m benchmarks.step_time`."""
