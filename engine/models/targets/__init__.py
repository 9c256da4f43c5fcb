"""Where do targets come from? A teacher, or the encoder itself."""
