"""Formats and plumbing. A reader of the tutorial may skip this folder; nothing here imports the
four files."""
