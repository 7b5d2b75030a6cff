"""Mixed-precision post-training quantization under an average-bits budget, measured.

The modules, in the order in which data flows: cell, models, data, schemes, allocate, quantize,
evaluate, store, tables, tracking; runner composes them.
"""

__version__ = "0.1.0"
