"""Metrics: pure functions in :mod:`mmasl.evaluation.functional`, evaluators in :mod:`mmasl.evaluation.metrics`."""
