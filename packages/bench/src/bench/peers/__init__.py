"""The contestants, each a subprocess in an environment of its own.

`protocol` is their side of the conversation, `process` the driver's; `ours` and `pytorch` compute. Only `process` and
`contestants` are read by the driver, so that neither jax nor torch is ever loaded beside the clock.
"""
