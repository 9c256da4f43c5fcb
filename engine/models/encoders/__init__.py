"""What encodes a single view? Networks from views [B, N, ...] to features [B, N, D]."""
