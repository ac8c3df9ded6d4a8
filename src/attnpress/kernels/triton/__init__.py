"""The GPU kernel in Triton: `steps` is the contract's arithmetic, `sweeps` the kernels, `launch` starts them."""
