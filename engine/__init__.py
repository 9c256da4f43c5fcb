"""How is seq-JEPA trained and evaluated? Commands, and a folder for each question on the way."""
