"""Running sparse24 checkpoints: one op, its back ends, the transformers loader and the vLLM plugin.

Nothing is imported here. `op` and `backends` need torch only, `hf` needs transformers, `vllm_plugin` needs vLLM,
which loads it through `vllm_entry`.
"""
