"""Codes for tokens: each token is replaced by one of a few, or described by it."""
