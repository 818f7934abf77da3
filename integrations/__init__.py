"""Adapters between offload and other training libraries, installed as ``offload.integrations``.

Each is imported only when asked for, so that ``import offload`` needs none of those libraries.
"""
