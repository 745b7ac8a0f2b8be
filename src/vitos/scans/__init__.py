"""Encoded images: in memory and on disk."""
