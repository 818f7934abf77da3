"""Streaming behind the names that other libraries gave it."""
