"""What a training step costs before it is run and when it is: memory by part, time, tokens/s.

`memory` defines the parts; `sides` builds the ways to train; `predict` says their memory without
allocating it, `measure` runs them.
"""
