"""flaxmill beside the tools one would pick instead, measured side by side in one run.

Every contestant is a subprocess that answers to the same small protocol (`bench.peers.protocol`), gets the same
weights, must give the same answers, and takes turns with the others. `bench` itself imports neither jax nor torch.
"""
