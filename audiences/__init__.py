"""Audiences: who belongs to which, and keeping advertising, CRM and mail in step with it."""
