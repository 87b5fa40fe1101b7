"""Sink/window attention: bounded caches, long positions, running streams."""
