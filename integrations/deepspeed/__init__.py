"""The DeepSpeed ZeRO plugin. Not there yet: this package holds its place in the distribution."""
