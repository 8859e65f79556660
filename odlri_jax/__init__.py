"""ODLRI in JAX: weights as a low-bit matrix plus a low-rank one, W ~ Q + L R, started from the outlier channels."""
