"""YAML files that compose into a run; they travel with the wheel as package data."""
