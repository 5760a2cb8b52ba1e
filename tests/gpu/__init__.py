"""These tests show what only a real GPU can show of the kernels; `make gpu` runs them.

The interpreter runs one program after another, one value beside the next: it has no races, no
rounding of the hardware, no second device and no memory to speak of. Here every op is repeated for
the same bits, run at real sizes against fp64, past 2^31 values, and beside the CPU's results.

Without a GPU all of it is skipped. `pytest tests/gpu --interpreted` runs the same bodies on the
CPU, in Triton's interpreter, at tiny sizes: that shows that they run, not that the kernels are
right.
"""
