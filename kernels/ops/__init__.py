"""One folder per op: rope/ holds the op `lorakit.kernels.rope` and its backends.

They lie apart from `lorakit.kernels`, which holds the public functions: a function and a folder of
one name would hide each other there.
"""
