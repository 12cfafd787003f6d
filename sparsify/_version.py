"""The version of the package, for modules that must not load the rest of it. The build reads it here too."""

__version__ = "0.2.0"
