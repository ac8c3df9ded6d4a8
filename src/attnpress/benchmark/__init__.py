"""bench: the compiled kernel timed beside what users have today, in turns of separate processes.

`attention` times single calls of attention, `whole_model` whole models; `turns` is the clock of both.
"""
