"""The GPU kernel in Triton: `steps` has the arithmetic of the contract, `sweeps` the kernels, `launch` starts them."""
