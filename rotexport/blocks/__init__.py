"""Decoder blocks one at a time: split from the graph, evaluated in PyTorch, fed with streamed activations."""
