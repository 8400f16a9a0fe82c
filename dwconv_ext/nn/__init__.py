"""Modules: parameters, BatchNorm folded in eval mode and with its activation in training, packed weights kept."""
