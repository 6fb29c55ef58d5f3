"""Pages of results: one HTML file each, which needs nothing but itself."""
