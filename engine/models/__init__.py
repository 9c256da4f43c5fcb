"""Which network is trained? Encoders, aggregator, predictor, and the source of its targets."""
