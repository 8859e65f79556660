"""Benchmarks: `make bench` runs all, each writes a table to bench_out/<name>.json."""
