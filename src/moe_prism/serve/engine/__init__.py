"""The computing side of the server."""
