"""Prompts: riddles hidden in running text, and rows of a data set, as tokens with questions."""
