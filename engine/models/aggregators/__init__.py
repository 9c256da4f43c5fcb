"""Aggregators: from the tokens of a sequence, [B, M, T], to one vector, [B, T]."""
