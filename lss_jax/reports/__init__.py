"""Runs at rest, and pages about them."""
