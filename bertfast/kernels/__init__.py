"""``kernels/<backend>/<word>.py``: ``supports``, ``forward``, ``backward`` of one op."""
