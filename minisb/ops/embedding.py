"""Token embedding: a row of the table for each token."""

from minisb.backend import op


@op
def embedding_forward(be, tokens, table):
    """tokens (B,T) integers, table (V,C) -> (B,T,C)."""
    return table[tokens]


@op
def embedding_backward(be, dx, tokens, dtable):
    """dx (B,T,C);  dtable (V,C) is added to.  A token seen n times gets n contributions."""
    be.xp.add.at(dtable, tokens.reshape(-1), dx.reshape(-1, dx.shape[-1]))
