"""Results: rows, files, charts and tables."""
