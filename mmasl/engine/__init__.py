"""Hooks and schedulers for MMEngine."""
