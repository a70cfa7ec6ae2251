"""The common ground of demo, benchmarks and evaluation: model, text, output folders, progress."""
