"""The config: schema and rules."""
