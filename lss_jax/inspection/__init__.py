"""Compiled training steps, and predictions of their collectives, memory and operations."""
