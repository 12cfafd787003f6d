"""Calibration text: files, data sets, and what the model writes itself. The way in is `calibration.calibration_tokens`."""
