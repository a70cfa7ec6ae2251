"""Runs: the grid of prompts, policies and budgets, answered from evicted caches, one prefill per prompt."""
