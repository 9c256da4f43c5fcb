"""Sources of the targets: whose features the prediction is compared with, and how they follow the encoder."""
