"""What reads a sequence of views and actions? Networks from tokens [B, M, T] to an aggregate [B, T]."""
