"""Layers of CRATE and ToST, and what they do to their tokens."""
