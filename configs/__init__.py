"""YAML files that describe a run, and the code that reads, checks and explains them."""
