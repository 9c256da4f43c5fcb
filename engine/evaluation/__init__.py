"""What do the features of a network hold? Probes, online and frozen, beside an untrained control."""
