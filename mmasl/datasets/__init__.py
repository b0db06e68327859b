"""Data sets, one a module, image transforms and checks of data."""
