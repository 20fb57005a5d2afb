"""Results as a page of HTML that needs no server."""
