"""The common ground of demo, benchmarks and evaluation: model, text, policies by name, presets, files, progress."""
