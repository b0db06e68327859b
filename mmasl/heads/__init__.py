"""What MMPretrain's own heads cannot do; imported where it is looked up, see :mod:`mmasl.registry`."""
