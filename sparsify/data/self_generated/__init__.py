"""Text that the model writes itself, for calibration without any data set."""
