"""Programs that measure a claim each: `python -m benchmarks.bench_<claim>`."""
