"""The chat server of `a2d_jax.serve`: the wire format, the thread that owns the model, the HTTP application."""
