"""Fuzzing of everything that reads what comes from outside; docs/contributing.md says how to run it.

targets.py: what is read, and what must hold; mutations.py: how inputs are changed; __main__.py: the long run, with atheris;
kernels/: the C++ entries, with libFuzzer and sanitizers; corpus/: inputs that reach much of the code, and those of findings.
"""
