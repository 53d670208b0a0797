"""What proves that the lessons hold: `python -m lessons._ci`."""
