"""Encoders: views [B, N, ...] to features [B, N, D], each view by itself."""
