"""Grids of colours, as in ARC: moves between them, and programs of moves."""
