"""The HTTP server, and what it says of itself: metrics and traces."""
