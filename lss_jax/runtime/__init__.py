"""Processes: start-up, watch, interrupts."""
