"""bench: the compiled kernel timed against existing implementations, in turns of separate processes.

`attention` times single calls of attention, `whole_model` whole models; both use the clock in `turns`.
"""
