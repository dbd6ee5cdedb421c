"""Triton kernels behind sparseft's ops. Imports torch and triton only, never sparseft.

One file per family: the jit functions, then the launchers (`launch_*`) that allocate, pick a tile
and launch. Checks, dispatch and autograd live in `sparseft.ops`, which imports these modules inside
its launch path; importing this package itself imports no Triton.
"""
