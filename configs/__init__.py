"""How is a run described? By YAML files, and the code that reads, checks and explains them."""
