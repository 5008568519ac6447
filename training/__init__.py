"""The offline side: from raw events to a verified model bundle."""
