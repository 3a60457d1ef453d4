"""Optimization of networks for inference, and the engines that run them."""
