"""The parts that operations are built from: Triton launches, matrix products, tensor lists, argument checks."""
