"""The config: schema, rules and loading."""
