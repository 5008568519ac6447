"""Destinations: the platforms that hold a copy of an audience, each behind `protocol.Destination`."""
