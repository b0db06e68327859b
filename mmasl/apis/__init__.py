"""Inference, prediction of data sets and export."""
