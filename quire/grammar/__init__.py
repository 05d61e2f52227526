"""Constrained output: grammars (llguidance), allowed tokens, banned words, as masks over the vocabulary."""
