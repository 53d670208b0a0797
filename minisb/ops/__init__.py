"""The mathematics: one file an operation, forward and backward side by side.

Conventions: `be`, the backend, comes first.  Gradients of inputs are returned in input order as
new arrays; gradients of parameters come last and are added to.  `saved` is what forward hands
to backward, the same for the reference and its native twin.  Layout is (B,T,H,D).
"""
