"""Tuning: a search for presets, on the tuning split."""
