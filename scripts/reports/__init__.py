"""HTML pages of results, each a file without other files."""
