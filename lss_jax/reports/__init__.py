"""Reports on runs: curves, losses by position, and pages."""
