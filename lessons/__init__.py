"""The lessons of minisb: `python -m lessons list`, from the project's root."""
