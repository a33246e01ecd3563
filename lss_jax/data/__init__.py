"""Bytes in, batches out: sources of text, and the loader that shards them over the mesh."""
