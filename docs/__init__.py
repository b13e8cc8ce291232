"""The pages beside this file and what writes them: `python -m docs.generate`."""
