"""Backends execute step plans on a device."""
