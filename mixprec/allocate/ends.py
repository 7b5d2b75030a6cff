"""head8, tail8, head4, tail4: the higher scheme from one end of the network, the rest lowest.

The report calls the layers near `lm_head` the *head* and those near the embedding the *tail*, the
reverse of what most people guess. Whole layers are filled from that end, in the order in which the
network applies them, until the next one would exceed the budget.
"""

from __future__ import annotations

from mixprec.allocate import fill


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    higher = next(scheme for scheme in schemes if scheme.bits == request.baseline.bits)
    from_head = request.baseline.name.startswith("head")
    return fill(layers[::-1] if from_head else layers, schemes[0], higher, budget)
