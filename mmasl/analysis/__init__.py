"""Analysis of losses, training data and predictions: advice on settings, gradient curves, calibration and errors."""
