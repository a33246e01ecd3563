"""Processes: start-up, peers, signals and interrupts."""
