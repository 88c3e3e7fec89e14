"""What the benchmarks share: clocks, rooflines, tables, runs of the product."""
