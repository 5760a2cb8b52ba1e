"""Adapters: attach, switch, merge, combine, initialize, save and load them."""
