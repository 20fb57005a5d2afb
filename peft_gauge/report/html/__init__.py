"""Results as a static HTML page."""
