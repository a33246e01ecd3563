"""Bytes in, batches out: sources of text, and the loader that cuts them over the mesh."""
