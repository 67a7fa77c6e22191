"""PURE: which split a row belongs to, by its content alone.

Rows with the same content are never in two splits; adding rows, reordering files or another seed moves no other row.
"""

from finetune_api.run import Split


def split_of(digest: bytes, validation: float, test: float = 0.0) -> Split:
    """`digest`: a content hash; `validation` and `test`: shares of the whole. Growing a share only adds to it."""
    # As many bits as a float holds, so that the place is always below 1.
    place = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    if place < validation:
        return "validation"
    # From the other end, so that changing one share leaves the other split as it is.
    if place >= 1.0 - test:
        return "test"
    return "train"
