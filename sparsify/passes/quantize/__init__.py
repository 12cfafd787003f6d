"""Quantization methods: `rtn` needs no data, `gptq` sweeps the columns on the Hessian. `grid` is what both round to."""
