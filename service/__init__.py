"""The online service: scores visitors from their recent events."""
