"""What does training minimise? A weighted sum of named terms."""
