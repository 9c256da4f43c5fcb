"""Which network is trained? Encoders, aggregator, predictor, and the source of the targets."""
