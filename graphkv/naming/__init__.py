"""Policies by name: the grammar of names, what makes a policy of one, and presets in files."""
