"""Modules that a fork server imports in tests."""
