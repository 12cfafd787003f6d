"""Ours beside llm-compressor, GPTQModel and llama.cpp on one model, one row each: `make versus`."""
