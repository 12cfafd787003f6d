"""Quantization methods: `rtn` needs no data, `gptq` sweeps the columns on the Hessian."""

METHODS = {"rtn": False, "gptq": True}  # name -> whether it needs calibration data
