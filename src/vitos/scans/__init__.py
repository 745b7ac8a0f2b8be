"""Encoded images: each image runs through the frozen vision encoder once.

Read in this order:

1. `store.py`: `ScanStore`, the scans of records in memory; it encodes missing images or reads them from a cache.
2. `cache.py`: `EmbeddingCache`, the cache on disk: its files, its checksums, and the fingerprint of its encoder.
3. `build.py`: `build_cache`, the work of `vitos data cache`.

docs/data.md, "Embedding cache", describes the command and the size of a cache.
"""
